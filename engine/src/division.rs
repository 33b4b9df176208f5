//! Divisions of integers that have no result: by zero, and of the smallest one by -1. onnxruntime looks out for the first in some of
//! its operators and for the second in none, and leaves them to the processor. One of ARM says 0 and the dividend, and goes on; x86
//! ends the process, so that one request with these numbers in it would end a server with all of its models. ONNX leaves the results
//! open; here they are 0 and the dividend on both.
//!
//! The signal that x86 raises is answered by what the instruction would have done: its registers are set, and the thread goes on
//! behind it. What is no such instruction ends the process as it always did.
#![cfg_attr(
    all(target_os = "linux", target_arch = "x86_64"),
    allow(unsafe_code, reason = "a signal's handler changes the registers of the thread that was stopped")
)]

use std::sync::atomic::{AtomicU64, Ordering};

/// How often it has happened in this process.
static FORGIVEN: AtomicU64 = AtomicU64::new(0);

/// How many divisions without a result there were in this process, since [`forgive`].
pub(crate) fn forgiven() -> u64 {
    FORGIVEN.load(Ordering::Relaxed)
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
pub(crate) fn forgive() {}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub(crate) use x86::forgive;

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod x86 {
    use std::sync::Once;
    use std::sync::atomic::Ordering;

    use super::FORGIVEN;

    /// Bytes of an instruction at most.
    const LONGEST: usize = 15;

    /// An instruction that divides.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Division {
        /// Its bytes.
        length: usize,
        width: Width,
        is_signed: bool,
    }

    /// The bits of a quotient, and of a remainder.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Width {
        /// Both in `ax`.
        Eight,
        /// In `ax` and `dx`, of which the rest stays.
        Sixteen,
        /// In `eax` and `edx`; the rest of `rax` and `rdx` becomes 0.
        ThirtyTwo,
        /// In `rax` and `rdx`.
        SixtyFour,
    }

    /// Reads a DIV or IDIV, whose bytes `at` gives one by one: what is behind the instruction may not be there. `None` for another.
    /// Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, chapter 2 and the two instructions.
    fn division(at: impl Fn(usize) -> u8) -> Option<Division> {
        let is_prefix = |byte| matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf2 | 0xf3);
        let mut next = (0..LONGEST).find(|&index| !is_prefix(at(index)))?;
        let is_short = (0..next).any(|index| at(index) == 0x66);
        let mut is_long = false;
        if matches!(at(next), 0x40..=0x4f) {
            is_long = at(next) & 8 != 0;
            next += 1;
        }
        let width = match at(next) {
            0xf6 => Width::Eight,
            0xf7 if is_long => Width::SixtyFour,
            0xf7 if is_short => Width::Sixteen,
            0xf7 => Width::ThirtyTwo,
            _ => return None,
        };
        let form = at(next + 1);
        let is_signed = match form >> 3 & 7 {
            6 => false,
            7 => true,
            // Others of this opcode multiply, negate or compare.
            _ => return None,
        };
        next += 2;
        let (mode, register) = (form >> 6, form & 7);
        let mut base = register;
        if mode != 3 && register == 4 {
            base = at(next) & 7;
            next += 1;
        }
        next += match (mode, base) {
            (0, 5) | (2, _) => 4,
            (1, _) => 1,
            _ => 0,
        };
        Some(Division { length: next, width, is_signed })
    }

    /// Gives integer divisions that have no result one in this process, from now on.
    pub(crate) fn forgive() {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            // SAFETY: all zeros are a `sigaction` without flags or blocked signals, and the handler has the form that SA_SIGINFO asks for.
            let failed = unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_flags = libc::SA_SIGINFO;
                action.sa_sigaction = handle as *const () as usize;
                libc::sigaction(libc::SIGFPE, &raw const action, std::ptr::null_mut()) != 0
            };
            if failed {
                let error = std::io::Error::last_os_error();
                tracing::warn!(%error, "a division without a result in a model would end this process");
            }
        });
    }

    /// Only what is allowed in a signal's handler: it writes registers and one counter, and calls nothing that may be half done in the
    /// thread that it stopped.
    extern "C" fn handle(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
        // FPE_INTDIV of <signal.h>; the smallest number by -1 is told as this, too.
        const DIVISION: libc::c_int = 1;
        const LOW: i64 = 0xffff;
        // SAFETY: the kernel calls this with both, which nobody else has.
        let (code, registers) =
            unsafe { ((*info).si_code, &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs) };
        let start = registers[libc::REG_RIP as usize] as *const u8;
        // SAFETY: the processor has read this instruction from there, and `division` looks at no byte behind it.
        let found = (code == DIVISION).then(|| division(|index| unsafe { *start.add(index) })).flatten();
        let Some(Division { length, width, is_signed }) = found else {
            // It ends the process, as soon as this returns.
            // SAFETY: the default action is always there, and both may be called here.
            unsafe {
                libc::signal(libc::SIGFPE, libc::SIG_DFL);
                libc::raise(libc::SIGFPE);
            }
            return;
        };
        let (quotient, remainder) = (libc::REG_RAX as usize, libc::REG_RDX as usize);
        // The smallest number by -1 is itself, as far as there is room for it.
        match width {
            Width::Eight => registers[quotient] &= !LOW,
            Width::Sixteen => {
                registers[quotient] &= !LOW;
                registers[remainder] &= !LOW;
            }
            Width::ThirtyTwo => {
                let is_smallest = is_signed && registers[quotient] as i32 == i32::MIN;
                registers[quotient] = if is_smallest { i64::from(i32::MIN as u32) } else { 0 };
                registers[remainder] = 0;
            }
            Width::SixtyFour => {
                let is_smallest = is_signed && registers[quotient] == i64::MIN;
                registers[quotient] = if is_smallest { i64::MIN } else { 0 };
                registers[remainder] = 0;
            }
        }
        registers[libc::REG_RIP as usize] += length as i64;
        FORGIVEN.fetch_add(1, Ordering::Relaxed);
    }

    #[cfg(test)]
    mod tests {
        use std::arch::asm;

        use super::*;

        #[test]
        fn divisions_are_read_in_every_form_and_nothing_behind_them() {
            use Width::{Eight, Sixteen, SixtyFour, ThirtyTwo};
            let signed = |length, width| Some(Division { length, width, is_signed: true });
            for (bytes, expected) in [
                (&[0xf7, 0xf9][..], signed(2, ThirtyTwo)),                     // idiv ecx
                (&[0x48, 0xf7, 0xf9], signed(3, SixtyFour)),                   // idiv rcx
                (&[0x41, 0xf7, 0xff], signed(3, ThirtyTwo)),                   // idiv r15d
                (&[0xf7, 0x39], signed(2, ThirtyTwo)),                         // idiv dword [rcx]
                (&[0x48, 0xf7, 0x7c, 0x24, 0x08], signed(5, SixtyFour)),       // idiv qword [rsp+8]
                (&[0x48, 0xf7, 0x3c, 0xc6], signed(4, SixtyFour)),             // idiv qword [rsi+rax*8]
                (&[0x48, 0xf7, 0x3d, 1, 0, 0, 0], signed(7, SixtyFour)),       // idiv qword [rip+1]
                (&[0x48, 0xf7, 0xbf, 0, 1, 0, 0], signed(7, SixtyFour)),       // idiv qword [rdi+256]
                (&[0x48, 0xf7, 0x3c, 0xc5, 0, 1, 0, 0], signed(8, SixtyFour)), // idiv qword [rax*8+256]
                (&[0x43, 0xf7, 0x7c, 0x95, 0x00], signed(5, ThirtyTwo)),       // idiv dword [r13+r10*4]
                (&[0x66, 0xf7, 0xf9], signed(3, Sixteen)),                     // idiv cx
                (&[0x66, 0x41, 0xf7, 0xf8], signed(4, Sixteen)),               // idiv r8w
                (&[0xf6, 0xf9], signed(2, Eight)),                             // idiv cl
                (&[0x40, 0xf6, 0xfe], signed(3, Eight)),                       // idiv sil
                (&[0x66, 0x48, 0xf7, 0xf9], signed(4, SixtyFour)),             // the longer of both
                (&[0x49, 0xf7, 0xf0], Some(Division { length: 3, width: SixtyFour, is_signed: false })), // div r8
                (&[0xf7, 0xe9], None),                                         // imul ecx
                (&[0xf7, 0xd9], None),                                         // neg ecx
                (&[0x0f, 0xaf], None),                                         // imul
            ] {
                // A byte behind the last would be out of bounds.
                assert_eq!(division(|index| bytes[index]), expected, "{bytes:02x?}");
            }
        }

        #[test]
        fn what_has_no_result_is_0_or_the_dividend_and_the_thread_goes_on() {
            forgive();
            let before = super::super::forgiven();
            for (dividend, divisor, expected) in
                [(7, 2_i64, (3, 1)), (7, 0, (0, 0)), (-7, 0, (0, 0)), (i64::MIN, -1, (i64::MIN, 0))]
            {
                let (mut quotient, mut remainder): (i64, i64);
                // SAFETY: these instructions change the registers that are named, and no memory.
                unsafe {
                    asm!("cqo", "idiv {}", in(reg) divisor, inout("rax") dividend => quotient, out("rdx") remainder);
                }
                assert_eq!((quotient, remainder), expected, "{dividend} / {divisor}");
                // SAFETY: the same, of a divisor in memory.
                unsafe {
                    asm!("cqo", "idiv qword ptr [{}]", in(reg) &raw const divisor, inout("rax") dividend => quotient, out("rdx") remainder);
                }
                assert_eq!((quotient, remainder), expected, "{dividend} / {divisor}");
            }
            for (dividend, divisor, expected) in [(-7, 2, (-3, -1)), (7, 0, (0, 0)), (i32::MIN, -1, (i32::MIN, 0))] {
                let (quotient, remainder): (i32, i32);
                // SAFETY: as above.
                unsafe {
                    asm!("cdq", "idiv {:e}", in(reg) divisor, inout("eax") dividend => quotient, out("edx") remainder);
                }
                assert_eq!((quotient, remainder), expected, "{dividend} / {divisor}");
            }
            let (quotient, remainder): (u64, u64);
            // SAFETY: as above.
            unsafe {
                asm!("div {}", in(reg) 0_u64, inout("rax") 1_u64 << 63 => quotient, inout("rdx") 0_u64 => remainder);
            }
            assert_eq!((quotient, remainder), (0, 0));
            assert!(super::super::forgiven() >= before + 9);
        }
    }
}
