//! Which nodes of a graph are quantised, and which activations have to be watched for it. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use sensorium_onnx::{DType, Model, NodeProto};

/// A table smaller than this stays in f32: what it would save is less than what the extra node costs.
const SMALLEST_TABLE_ELEMENTS: usize = 1024;

/// What is done to one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// `MatMul(activation, weight)` with a constant weight `[in, out]`.
    MatMul {
        /// The first input.
        activation: String,
        /// The second input.
        weight: String,
    },
    /// `Conv(activation, weight, bias?)` with a constant weight `[out, in, ..]` and a constant bias `[out]`.
    Conv {
        /// The first input.
        activation: String,
        /// The second input.
        weight: String,
        /// The third input, where there is one.
        bias: Option<String>,
        /// What it makes.
        output: String,
    },
    /// `Gather(weight, indices)` along axis 0 of a constant table.
    Gather {
        /// The table.
        weight: String,
    },
}

impl Target {
    /// The constant that becomes INT8.
    pub fn weight(&self) -> &str {
        match self {
            Self::MatMul { weight, .. } | Self::Conv { weight, .. } | Self::Gather { weight } => weight,
        }
    }

    /// The activations whose ranges are needed.
    fn observed(&self) -> impl Iterator<Item = &String> {
        let (input, output) = match self {
            Self::MatMul { activation, .. } => (Some(activation), None),
            Self::Conv { activation, output, .. } => (Some(activation), Some(output)),
            Self::Gather { .. } => (None, None),
        };
        input.into_iter().chain(output)
    }

    /// Whether both read the same weight in the same way.
    fn reads_as(&self, other: &Self) -> bool {
        self.weight() == other.weight() && std::mem::discriminant(self) == std::mem::discriminant(other)
    }
}

/// What is quantised in one graph.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GraphPlan {
    /// By position of the node.
    pub targets: BTreeMap<usize, Target>,
}

impl GraphPlan {
    /// The activations to watch, each once, in a fixed order.
    pub fn observed(&self) -> BTreeSet<&str> {
        self.targets.values().flat_map(Target::observed).map(String::as_str).collect()
    }

    /// The constants that become INT8.
    pub fn weights(&self) -> BTreeSet<&str> {
        self.targets.values().map(Target::weight).collect()
    }
}

/// Plans one graph: every `MatMul` and `Conv` of an activation with a constant f32 weight, and every lookup in a constant
/// table, unless `excluded` says so of the weight's name.
///
/// A weight that is also read in another way stays as it is, with all its readers: stored twice it would cost more than
/// it saves. Products of two activations stay in f32: they are small, have no weights to shrink, and are where attention
/// is most sensitive.
pub fn plan_graph(model: &Model, excluded: impl Fn(&str) -> bool) -> GraphPlan {
    let nodes = model.graph().node.iter().enumerate();
    let targets: BTreeMap<usize, Target> = nodes
        .filter_map(|(position, node)| Some((position, target(model, node)?)))
        .filter(|(_, target)| !excluded(target.weight()))
        .collect();
    let readers = readers(model);
    let alone = |name: &str| readers.get(name).is_some_and(|positions| positions.len() == 1);
    let is_clean = |target: &Target| match target {
        // The scales of a convolution's weight depend on what it is multiplied with.
        Target::Conv { weight, bias, .. } => alone(weight) && bias.as_ref().is_none_or(|bias| alone(bias)),
        Target::MatMul { weight, .. } | Target::Gather { weight } => readers[weight.as_str()]
            .iter()
            .all(|position| targets.get(position).is_some_and(|reader| reader.reads_as(target))),
    };
    let is_output = |name: &str| model.outputs().iter().any(|output| output.name == name);
    let kept = targets.iter().filter(|(_, target)| is_clean(target) && !is_output(target.weight()));
    GraphPlan { targets: kept.map(|(&position, target)| (position, target.clone())).collect() }
}

/// Positions of the nodes that read each value.
fn readers(model: &Model) -> HashMap<&str, Vec<usize>> {
    let mut readers: HashMap<&str, Vec<usize>> = HashMap::new();
    for (position, node) in model.graph().node.iter().enumerate() {
        for input in &node.input {
            readers.entry(input).or_default().push(position);
        }
    }
    readers
}

fn target(model: &Model, node: &NodeProto) -> Option<Target> {
    let input = |index: usize| node.input.get(index).filter(|name| !name.is_empty());
    let constant = |name: &str, ranks: std::ops::RangeInclusive<usize>| {
        let found = model.initializer(name).filter(|tensor| tensor.dtype() == Some(DType::F32));
        found.filter(|tensor| ranks.contains(&tensor.dims.len()) && tensor.dims.iter().all(|&dim| dim > 0))
    };
    let activation = |name: &String| model.initializer(name).is_none().then(|| name.clone());
    let is_constant = |name: &&String, ranks| constant(name, ranks).is_some();
    if node.is("MatMul") {
        let weight = input(1).filter(|name| is_constant(name, 2..=2))?.clone();
        Some(Target::MatMul { activation: activation(input(0)?)?, weight })
    } else if node.is("Conv") {
        let weight = input(1).filter(|name| is_constant(name, 3..=5))?.clone();
        let bias = input(2).cloned();
        if bias.as_ref().is_some_and(|bias| constant(bias, 1..=1).is_none()) {
            return None;
        }
        Some(Target::Conv { activation: activation(input(0)?)?, weight, bias, output: node.output.first()?.clone() })
    } else if node.is("Gather") && node.int_or("axis", 0) == 0 {
        let table = input(0)?;
        let elements = constant(table, 2..=2)?.shape().iter().product::<usize>();
        (elements >= SMALLEST_TABLE_ELEMENTS).then(|| Target::Gather { weight: table.clone() })
    } else {
        None
    }
}
