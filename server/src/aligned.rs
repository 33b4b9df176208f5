//! Memory for tensors that arrive in pieces.

use bytes::{Buf, BufMut as _, Bytes, BytesMut};

/// What engines want the address of a tensor to be a multiple of. They copy one that is not.
const ALIGNMENT: usize = 64;

/// Memory for pieces that become one, of which a certain byte lies as engines want it.
#[derive(Debug)]
pub(crate) struct Aligned {
    bytes: BytesMut,
    skipped: usize,
}

impl Aligned {
    /// Memory for `length` bytes, of which the one at `start` is the first of a tensor. It is not touched before it is
    /// needed.
    pub(crate) fn new(length: usize, start: usize) -> Self {
        let mut bytes = BytesMut::with_capacity(length + ALIGNMENT);
        let skipped = bytes.as_ptr().addr().wrapping_add(start).wrapping_neg() % ALIGNMENT;
        bytes.put_bytes(0, skipped);
        Self { bytes, skipped }
    }

    /// Adds a piece.
    pub(crate) fn put(&mut self, piece: impl Buf) {
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
    fn the_byte_at_the_start_is_aligned_wherever_that_is() {
        for start in [0, 1, 63, 64, 97] {
            let (first, rest) = (vec![1; 50], vec![2; 500]);
            let mut whole = Aligned::new(550, start);
            whole.put(first.as_slice());
            assert_eq!(whole.len(), 50);
            whole.put(rest.as_slice());
            let whole = whole.freeze();
            assert_eq!(whole, [first, rest].concat());
            assert_eq!(whole[start..].as_ptr().addr() % ALIGNMENT, 0);
        }
    }
}
