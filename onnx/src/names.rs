use std::collections::HashSet;

use crate::proto::GraphProto;

/// Hands out names that nothing in a graph has yet. They are short, because names count in the size of small models.
#[derive(Clone, Debug, Default)]
pub struct Names {
    taken: HashSet<String>,
    next: u64,
}

impl Names {
    /// Names that keep away from those of all values in `graph`.
    pub fn of(graph: &GraphProto) -> Self {
        let inputs = graph.input.iter().map(|input| &input.name);
        let initializers = graph.initializer.iter().map(|tensor| &tensor.name);
        let values = graph.node.iter().flat_map(|node| &node.output);
        Self { taken: inputs.chain(initializers).chain(values).cloned().collect(), next: 0 }
    }

    /// Marks a name as in use.
    pub fn take(&mut self, name: &str) {
        self.taken.insert(name.to_owned());
    }

    /// A name that is not in use; from now on it is.
    pub fn fresh(&mut self) -> String {
        loop {
            let name = short_name(self.next);
            self.next += 1;
            if self.taken.insert(name.clone()) {
                return name;
            }
        }
    }
}

/// `_` and the number in base 36: five characters name the first 1.6 million values.
fn short_name(mut number: u64) -> String {
    let mut digits = Vec::new();
    loop {
        digits.push(char::from_digit((number % 36) as u32, 36).unwrap_or('0'));
        number /= 36;
        if number == 0 {
            break;
        }
    }
    std::iter::once('_').chain(digits.into_iter().rev()).collect()
}
