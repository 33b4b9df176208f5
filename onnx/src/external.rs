//! Files beside a model's own in which its weights lie.

use std::collections::BTreeSet;

use prost::encoding::{WireType, decode_key, decode_varint};

/// Subgraphs in each other, at most, that are looked through.
const DEPTH: u32 = 16;

/// Where a model says that the data of its tensors is: names of files, as it writes them, of all tensors in all of its graphs. Reads no more
/// than these of `model`, which may be no model at all.
pub fn external_files(model: &[u8]) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    // ModelProto.graph
    for graph in fields(model).filter_map(|(field, graph)| (field == 7).then_some(graph)) {
        in_graph(graph, DEPTH, &mut found);
    }
    found
}

/// Of a `GraphProto`.
fn in_graph(graph: &[u8], depth: u32, found: &mut BTreeSet<String>) {
    for (field, content) in fields(graph) {
        match field {
            // node: its attributes.
            1 if depth > 0 => fields(content).filter(|(field, _)| *field == 5).for_each(|(_, attribute)| {
                for (field, content) in fields(attribute) {
                    match field {
                        // t and tensors, g and graphs.
                        5 | 10 => in_tensor(content, found),
                        6 | 11 => in_graph(content, depth - 1, found),
                        _ => {}
                    }
                }
            }),
            // initializer
            5 => in_tensor(content, found),
            // sparse_initializer: its values and indices.
            15 => fields(content).filter(|(field, _)| matches!(field, 1 | 2)).for_each(|(_, it)| in_tensor(it, found)),
            _ => {}
        }
    }
}

/// Of a `TensorProto`: the entry `location` of its external_data.
fn in_tensor(tensor: &[u8], found: &mut BTreeSet<String>) {
    for (_, entry) in fields(tensor).filter(|(field, _)| *field == 13) {
        let text = |wanted| fields(entry).find(|(field, _)| *field == wanted).map(|(_, text)| text);
        if text(1) == Some(b"location")
            && let Some(Ok(file)) = text(2).map(str::from_utf8)
        {
            found.insert(file.to_owned());
        }
    }
}

/// The fields of a message that have a length, up to the first thing that is no protobuf.
fn fields(mut message: &[u8]) -> impl Iterator<Item = (u32, &[u8])> {
    std::iter::from_fn(move || {
        while !message.is_empty() {
            let (field, wire_type) = decode_key(&mut message).ok()?;
            let length = match wire_type {
                WireType::LengthDelimited => usize::try_from(decode_varint(&mut message).ok()?).ok()?,
                WireType::Varint => {
                    decode_varint(&mut message).ok()?;
                    continue;
                }
                WireType::SixtyFourBit => 8,
                WireType::ThirtyTwoBit => 4,
                WireType::StartGroup | WireType::EndGroup => continue,
            };
            let (content, rest) = message.split_at_checked(length)?;
            message = rest;
            if wire_type == WireType::LengthDelimited {
                return Some((field, content));
            }
        }
        None
    })
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::proto::{GraphProto, ModelProto, StringStringEntryProto, TensorProto};

    #[test]
    fn files_are_found_wherever_a_tensor_names_them() {
        let entry = |key: &str, value: &str| {
            StringStringEntryProto { key: key.to_owned(), value: value.to_owned() }.encode_to_vec()
        };
        let tensor = |file: &str| TensorProto {
            external_data: vec![entry("offset", "4096"), entry("location", file)],
            ..TensorProto::default()
        };
        let inner = GraphProto { initializer: vec![tensor("in/ner.bin")], ..GraphProto::default() };
        // node { attribute { g: inner } attribute { t: tensor } }
        let framed = |field: u8, content: &[u8]| {
            let mut bytes = vec![field << 3 | 2];
            prost::encoding::encode_varint(content.len() as u64, &mut bytes);
            bytes.extend_from_slice(content);
            bytes
        };
        let attributes =
            [framed(5, &framed(6, &inner.encode_to_vec())), framed(5, &framed(5, &tensor("constant").encode_to_vec()))];
        let outer = GraphProto { initializer: vec![tensor("weights"), tensor("weights")], ..GraphProto::default() };
        let graph = [outer.encode_to_vec(), framed(1, &attributes.concat())].concat();
        let model = [ModelProto { ir_version: 9, ..ModelProto::default() }.encode_to_vec(), framed(7, &graph)].concat();
        let found: Vec<_> = external_files(&model).into_iter().collect();
        assert_eq!(found, ["constant", "in/ner.bin", "weights"]);
        for cut in 0..model.len() {
            external_files(&model[..cut]);
        }
        assert!(external_files(b"<!DOCTYPE html>").is_empty());
    }
}
