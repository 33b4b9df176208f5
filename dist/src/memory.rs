//! How the C library holds the memory that libtorch's CPU tensors are made of.

use crate::ffi;

/// Keeps freed memory in this process for what is allocated next.
///
/// A training step frees and allocates the same megabytes over and over. By default glibc gives most of them back to the
/// kernel in between, and gets them again page by page: a tenth of a step's time in the easy-VQA example. The price is
/// that a process stays at its largest size. Elsewhere than on glibc this does nothing.
pub fn keep_freed_memory() {
    ffi::keep_freed_memory();
}
