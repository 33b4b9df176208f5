//! Parameters: what a block declares, and where their numbers are kept.

use std::collections::BTreeMap;
use std::ops::Index;

/// How a parameter starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Uniform in `+-gain / sqrt(fan_in)`.
    Uniform {
        /// How many inputs one output sums.
        fan_in: i64,
        /// Multiplier of the bound.
        gain: f64,
    },
    /// Normal with mean zero and this standard deviation.
    Normal(f64),
    /// One value everywhere.
    Constant(f64),
}

/// One parameter of a block.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamSpec {
    /// Name inside the block, such as `qkv.weight`.
    pub name: &'static str,
    /// Dimensions.
    pub shape: Vec<i64>,
    /// Starting values.
    pub init: Init,
}

impl ParamSpec {
    pub(crate) fn new(name: &'static str, shape: &[i64], init: Init) -> Self {
        Self { name, shape: shape.to_vec(), init }
    }

    /// How many numbers it holds.
    pub fn numel(&self) -> i64 {
        self.shape.iter().product()
    }

    /// Whether weight decay applies: to matrices and kernels, not to gains, biases and scales.
    pub fn decays(&self) -> bool {
        self.shape.len() >= 2
    }
}

/// A block's parameters at hand, in the order of its declaration, found by name.
#[derive(Clone, Copy)]
pub struct ParamView<'a, V> {
    specs: &'a [ParamSpec],
    values: &'a [V],
}

impl<'a, V> ParamView<'a, V> {
    /// Joins declarations and values.
    ///
    /// # Panics
    /// When there are not as many values as declarations: a caller's bug, not an input's.
    pub fn new(specs: &'a [ParamSpec], values: &'a [V]) -> Self {
        assert_eq!(specs.len(), values.len(), "one value per declared parameter");
        Self { specs, values }
    }

    /// How many numbers the parameter `name` holds.
    ///
    /// # Panics
    /// As indexing does.
    pub fn len_of(&self, name: &str) -> i64 {
        self.specs[self.position(name)].numel()
    }

    fn position(&self, name: &str) -> usize {
        match self.specs.iter().position(|spec| spec.name == name) {
            Some(at) => at,
            None => panic!("the block declares no parameter {name}"),
        }
    }
}

impl<V> Index<&str> for ParamView<'_, V> {
    type Output = V;

    /// # Panics
    /// When the block has not declared `name`: every block is run by this crate's tests, so that shows there.
    fn index(&self, name: &str) -> &V {
        &self.values[self.position(name)]
    }
}

/// Numbers of one parameter on the host, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    /// Dimensions.
    pub shape: Vec<i64>,
    /// `shape.product()` numbers.
    pub data: Vec<f32>,
}

/// All parameters of a network by full name (`BLOCK.PARAMETER`).
pub type Weights = BTreeMap<String, HostTensor>;
