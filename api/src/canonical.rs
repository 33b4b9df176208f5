//! JSON with one spelling, for digests and for generated files.

use std::collections::BTreeMap;

use serde_json::Value;

/// `value` with the keys of every object in order. `serde_json` alone does not promise that: any crate of a build may
/// switch it to insertion order.
pub fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(object) => {
            let members: BTreeMap<&String, &Value> = object.iter().collect();
            members.into_iter().map(|(key, member)| (key.clone(), sorted(member))).collect()
        }
        Value::Array(items) => items.iter().map(sorted).collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => value.clone(),
    }
}

/// `value` [`sorted`] and without white space: equal values have equal bytes.
pub fn canonical_json(value: &Value) -> String {
    sorted(value).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_have_equal_bytes_whatever_the_order_they_were_written_in() {
        let one: Value = serde_json::from_str(r#"{"b": [1, {"d": null, "c": "x\"y"}], "a": 1.5}"#).unwrap();
        let other: Value = serde_json::from_str(r#"{"a": 1.5, "b": [1, {"c": "x\"y", "d": null}]}"#).unwrap();
        assert_eq!(canonical_json(&one), r#"{"a":1.5,"b":[1,{"c":"x\"y","d":null}]}"#);
        assert_eq!(canonical_json(&one), canonical_json(&other));
    }
}
