//! Memory for tensors that arrive in pieces.

use bytes::{Buf, BufMut as _, Bytes, BytesMut};

/// What engines want the address of a tensor to be a multiple of. They copy one that is not.
const ALIGNMENT: usize = 64;
/// Bytes that there is room for before any has come: who announces more has to send it.
const AT_FIRST: usize = 1 << 20;

/// Memory for pieces that become one, of which a certain byte lies as engines want it.
#[derive(Debug)]
pub(crate) struct Aligned {
    bytes: BytesMut,
    skipped: usize,
    start: usize,
    foreseen: usize,
}

impl Aligned {
    /// Memory for bytes of which `foreseen` are to come, and the one at `start` is the first of a tensor. It is not touched
    /// before it is needed.
    pub(crate) fn new(foreseen: usize, start: usize) -> Self {
        Self::with_room(foreseen.min(AT_FIRST), foreseen, start)
    }

    fn with_room(length: usize, foreseen: usize, start: usize) -> Self {
        let mut bytes = BytesMut::with_capacity(length + ALIGNMENT);
        let skipped = bytes.as_ptr().addr().wrapping_add(start).wrapping_neg() % ALIGNMENT;
        bytes.put_bytes(0, skipped);
        Self { bytes, skipped, start, foreseen }
    }

    /// Adds a piece; where there is no room for it, all of them move.
    pub(crate) fn put(&mut self, piece: impl Buf) {
        let length = self.len() + piece.remaining();
        if length > self.bytes.capacity() - self.skipped {
            let doubled = length.saturating_mul(2);
            let room = if length <= self.foreseen { doubled.min(self.foreseen) } else { doubled };
            let mut roomier = Self::with_room(room, self.foreseen, self.start);
            roomier.bytes.put_slice(&self.bytes[self.skipped..]);
            *self = roomier;
        }
        self.bytes.put(piece);
    }

    /// Bytes that were put.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len() - self.skipped
    }

    /// What was put, as one.
    pub(crate) fn freeze(self) -> Bytes {
        self.bytes.freeze().slice(self.skipped..)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_only_announced_takes_no_memory_and_what_comes_as_much_as_it_is() {
        let mut whole = Aligned::new(3 << 20, 5);
        assert!(whole.bytes.capacity() <= AT_FIRST + ALIGNMENT);
        let piece = vec![7; 1 << 20];
        for _ in 0..3 {
            whole.put(piece.as_slice());
        }
        assert!(whole.bytes.capacity() <= (3 << 20) + ALIGNMENT, "{}", whole.bytes.capacity());
        assert_eq!(whole.freeze(), piece.repeat(3));
    }

    #[test]
    fn the_byte_at_the_start_is_aligned_wherever_that_is_also_of_more_than_was_foreseen() {
        for (start, foreseen) in [(0, 550), (1, 550), (63, 550), (64, 550), (97, 550), (97, 10), (3, 100), (3, 2 << 30)]
        {
            let (first, rest) = (vec![1; 50], vec![2; 500]);
            let mut whole = Aligned::new(foreseen, start);
            whole.put(first.as_slice());
            assert_eq!(whole.len(), 50);
            whole.put(rest.as_slice());
            let whole = whole.freeze();
            assert_eq!(whole, [first, rest].concat());
            assert_eq!(whole[start..].as_ptr().addr() % ALIGNMENT, 0);
        }
    }
}
