//! Laws that hold for every manifest, good or bad.

use crate::fixtures::{all, parse};
use proptest::prelude::*;
use sensorium_api::Resource;
use sensorium_api::manifest::Cause;
use serde_json::{Value, json};

/// Paths of every value in a document.
fn pointers(value: &Value, path: &str, found: &mut Vec<String>) {
    found.push(path.to_owned());
    match value {
        Value::Object(object) => {
            object.iter().for_each(|(name, child)| pointers(child, &format!("{path}/{name}"), found));
        }
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(i, child)| pointers(child, &format!("{path}/{i}"), found));
        }
        _ => {}
    }
}

fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (-3_i64..70_000).prop_map(Value::from),
        any::<f64>().prop_map(|number| json!(number)),
        "[a-z:/._{}'\"-]{0,12}".prop_map(Value::from),
        "\\PC{0,90}".prop_map(Value::from),
        prop::collection::vec(0..9_i64, 0..4).prop_map(Value::from),
        prop::collection::btree_map("[a-z]{1,4}", 0..9_i64, 0..3).prop_map(|map| json!(map)),
    ]
}

fn any_manifest() -> impl Strategy<Value = Value> {
    let change = (any::<prop::sample::Index>(), any_value());
    (0..4_usize, prop::collection::vec(change, 0..3)).prop_map(|(kind, changes)| {
        let mut document = all()[kind].clone();
        for (place, value) in changes {
            let mut found = Vec::new();
            pointers(&document, "", &mut found);
            // Not the document itself: an empty one is skipped, not refused.
            let pointer: &String = place.get(&found[1..]);
            if let Some(target) = document.pointer_mut(pointer) {
                *target = value;
            }
        }
        document
    })
}

fn to_json(resource: &Resource) -> Value {
    match resource {
        Resource::TrainingJob(object) => serde_json::to_value(object),
        Resource::CompressionJob(object) => serde_json::to_value(object),
        Resource::ServingJob(object) => serde_json::to_value(object),
        Resource::ModelArtifact(object) => serde_json::to_value(object),
    }
    .unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_the_schema_admits_is_an_object_of_its_kind(document in any_manifest()) {
        if let Err(error) = parse(&document) {
            for problem in error.problems {
                prop_assert!(!matches!(problem.cause, Cause::Undecodable { .. }), "{}", problem);
            }
        }
    }

    #[test]
    fn an_accepted_resource_written_out_is_accepted_as_the_same(document in any_manifest()) {
        if let Ok(resource) = parse(&document) {
            prop_assert_eq!(parse(&to_json(&resource)).unwrap(), resource);
        }
    }
}
