//! Where memory comes from: that of requests from mimalloc, that of engines, which are C++, from glibc.

/// What the programs allocate with. Every request has parts of some kilobytes, for which glibc has no cache: with it a small
/// request costs a tenth more.
pub use mimalloc::MiMalloc as Allocator;

/// Pieces of at least so many bytes are the system's again as soon as they are free.
const LARGE: (&str, &str) = ("MALLOC_MMAP_THRESHOLD_", "1048576");
/// What the heap keeps at its end.
const KEPT: (&str, &str) = ("MALLOC_TRIM_THRESHOLD_", "2097152");
/// Milliseconds for which mimalloc keeps what nobody uses. By itself it keeps that for 10: requests of half a MiB then find their
/// memory gone whenever a batch takes longer, and having each page anew is 3 to 5 percent of a small vision model's time.
const DELAY: (&str, &str) = ("MIMALLOC_PURGE_DELAY", "1000");

/// glibc asks for pages of 2 MiB where the kernel has them for those who ask (`madvise`, as most distributions set it). Weights are
/// read from one end to the other in each run, which is 4 to 7 percent shorter with them.
const HUGE: (&str, &str) = ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1");
/// It does so for one heap alone. Engines allocate seldom while they run, since they keep what they had.
const ONE_HEAP: (&str, &str) = ("MALLOC_ARENA_MAX", "1");

/// What the environment has to say: a glibc that gives large pieces of memory back to the system when they are free, and a mimalloc
/// that keeps them for a second.
///
/// glibc gives them back from a size that it raises with every such piece, up to 32 MiB: from then on weights lie in its heaps, among
/// small things that stay, and a model that is let go leaves most of its memory with the process (of 100 MiB of weights
/// 125 MiB were kept, now 11 MiB are). The settings of both are read from the environment before `main`, and changing them later
/// takes `unsafe`.
pub(crate) const SETTINGS: [(&str, &str); 5] = [LARGE, KEPT, DELAY, HUGE, ONE_HEAP];
