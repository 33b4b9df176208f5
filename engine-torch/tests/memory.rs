//! Where the tensors of a run come from, and where they go. Alone in its process, whose memory is measured.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::float_cmp, reason = "small whole numbers, which floats hold exactly")]

use sensorium_engine::{DType, Declared, DeclaredTensor, Engine as _, Options, RawTensor};
use sensorium_engine_torch::{TorchScript, compile};

const MIB: u64 = 1 << 20;
/// Bytes of a run's largest tensor: more than glibc ever keeps of its own accord.
const LARGEST: u64 = 48 * MIB;
/// Tensors of `x.shape[0]` times a MiB, two at a time, and smaller ones after them, which are too small to take their places.
const SOURCE: &str = "def forward(self, x):
    y = x.repeat(256 * 1024)
    total = (y + 1).mean()
    y = x.repeat(64 * 1024)
    total = total + (y * 2).mean()
    y = x.repeat(24 * 1024)
    z = y + y
    total = total + (y * z).mean()
    return total.reshape(1)
";

/// Pages of this thread that the kernel had to find for it.
fn faults() -> u64 {
    let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    fields.split(' ').nth(7).unwrap().parse().unwrap()
}

/// Bytes that are resident.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

fn run(engine: &mut TorchScript, mib: u64) {
    let x = RawTensor::from_vec(DType::Fp32, vec![mib as i64], vec![3.0_f32; mib as usize]).unwrap();
    let found = engine.run_raw(&[x], &[0]).unwrap();
    let found = found[0].numbers::<f32>()[0];
    assert!((found - 28.0).abs() < 0.1, "{found}");
}

#[test]
fn what_a_run_leaves_is_what_the_next_one_takes_and_goes_with_the_module() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.pt");
    compile(SOURCE, &[], &path).unwrap();
    let declared = declared(Some(1));
    let mut engine = TorchScript::open(&path, Options::default(), &declared).unwrap();
    let empty = resident();
    // Until the graph is as it will be.
    for _ in 0..5 {
        run(&mut engine, LARGEST / MIB);
    }
    let before = faults();
    for _ in 0..4 {
        run(&mut engine, LARGEST / MIB);
    }
    // Less than a tenth of the smallest tensor of each run.
    let found = faults() - before;
    assert!(found < 4 * (LARGEST * 24 / 256 / 4096) / 10, "{found} pages were new in four runs");

    // Two of the largest and two of a quarter are what a run has need of, and ever other sizes must not add up.
    for mib in (1..=LARGEST / MIB).rev() {
        run(&mut engine, mib);
    }
    let kept = resident().saturating_sub(empty);
    assert!(kept < 5 * LARGEST, "{} MiB are kept", kept / MIB);

    let kept = resident();
    drop(engine);
    let given_back = kept - resident();
    assert!(given_back >= LARGEST, "{given_back} bytes were given back");

    a_part_of_a_tensor_keeps_no_more_than_itself();
}

/// In one test with the others, beside which no memory may be taken.
fn a_part_of_a_tensor_keeps_no_more_than_itself() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.pt");
    compile("def forward(self, x):\n    return x.repeat(256 * 1024)[-1000:]\n", &[], &path).unwrap();
    let mut engine = TorchScript::open(&path, Options::default(), &declared(Some(1000))).unwrap();
    let x = RawTensor::from_vec(DType::Fp32, vec![(LARGEST / MIB) as i64], vec![3.0_f32; 48]).unwrap();
    let mut answers = engine.run_raw(std::slice::from_ref(&x), &[0]).unwrap();
    let before = resident();
    for _ in 0..8 {
        answers.extend(engine.run_raw(std::slice::from_ref(&x), &[0]).unwrap());
    }
    assert!(answers.iter().all(|answer| answer.numbers::<f32>().iter().all(|value| *value == 3.0)));
    let taken = resident().saturating_sub(before);
    assert!(taken < 2 * LARGEST, "{} MiB are kept by answers of 4 KiB", taken / MIB);
}

/// `x`, and so many numbers.
fn declared(outputs: Option<u64>) -> Declared {
    let tensor =
        |name: &str, size| DeclaredTensor { name: name.to_owned(), dtype: Some(DType::Fp32), shape: Some(vec![size]) };
    let (inputs, outputs) = (vec![tensor("x", None)], vec![tensor("OUTPUT__0", outputs)]);
    Declared { inputs, outputs, ..Declared::default() }
}
