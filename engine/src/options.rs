use std::fmt;
use std::num::NonZeroUsize;
use std::str::FromStr;

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

/// Text that names no device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{value:?} is not where graphs run; write cpu, cuda or tensorrt, with the index of a GPU where it is not the first: cuda:1"
)]
pub struct DeviceError {
    value: String,
}

impl FromStr for Device {
    type Err = DeviceError;

    /// `cpu`, `cuda[:INDEX]` or `tensorrt[:INDEX]`.
    fn from_str(value: &str) -> Result<Self, DeviceError> {
        let (name, index) = value.split_once(':').unwrap_or((value, "0"));
        match (name, index.parse()) {
            _ if value == "cpu" => Ok(Self::Cpu),
            ("cuda", Ok(index @ 0..)) => Ok(Self::Cuda(index)),
            ("tensorrt", Ok(index @ 0..)) => Ok(Self::TensorRt(index)),
            _ => Err(DeviceError { value: value.to_owned() }),
        }
    }
}

impl Device {
    /// The index of the GPU, where it is one.
    pub fn gpu(self) -> Option<i32> {
        match self {
            Self::Cpu => None,
            Self::Cuda(index) | Self::TensorRt(index) => Some(index),
        }
    }
}

impl fmt::Display for Device {
    /// As it is read.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => formatter.write_str("cpu"),
            Self::Cuda(index) => write!(formatter, "cuda:{index}"),
            Self::TensorRt(index) => write!(formatter, "tensorrt:{index}"),
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_a_name_and_the_index_of_a_gpu() {
        for (text, device) in [
            ("cpu", Device::Cpu),
            ("cuda", Device::Cuda(0)),
            ("cuda:1", Device::Cuda(1)),
            ("tensorrt:3", Device::TensorRt(3)),
        ] {
            assert_eq!(text.parse(), Ok(device), "{text}");
            assert_eq!(device.to_string().parse(), Ok(device), "{text}");
        }
        for text in ["", "gpu", "cpu:0", "cuda:", "cuda:-1", "cuda:a"] {
            let error = text.parse::<Device>().unwrap_err();
            assert!(error.to_string().contains("cpu, cuda or tensorrt"), "{error}");
        }
    }
}
