use std::num::NonZeroUsize;

/// How a graph is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Threads that share the work inside one operator, the caller's included. More make one run faster and, on a
    /// loaded server, all runs together slower: there, more engines with one thread each do better.
    pub threads: NonZeroUsize,
    /// Threads that run independent operators side by side; `None` for one operator after the other.
    pub inter_threads: Option<NonZeroUsize>,
    /// Whether memory of intermediate results is kept from run to run. Without, a run takes longer, and a large batch
    /// leaves nothing behind.
    pub arena: bool,
    /// Whether what the arena has grown to is given back after each run.
    pub shrink_arena: bool,
    /// Whether memory is laid out once for each shape of inputs.
    pub memory_pattern: bool,
    /// How much a graph is rewritten when it is opened.
    pub optimization: Optimization,
    /// Where it runs.
    pub device: Device,
}

/// How much a graph is rewritten when it is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Optimization {
    /// Constants are folded, what has no effect is removed.
    Basic,
    /// Operators are fused, too.
    Extended,
    /// Also layouts that suit the processor.
    #[default]
    All,
}

/// Where a graph runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// On the processor.
    #[default]
    Cpu,
    /// On the GPU of this index, by CUDA.
    Cuda(i32),
    /// On the GPU of this index, by TensorRT, and by CUDA what that cannot run.
    TensorRt(i32),
}

impl Default for Options {
    /// One thread on the processor, everything optimised.
    fn default() -> Self {
        Self {
            threads: NonZeroUsize::MIN,
            inter_threads: None,
            arena: true,
            shrink_arena: false,
            memory_pattern: true,
            optimization: Optimization::All,
            device: Device::Cpu,
        }
    }
}
