//! The generated definitions: committed as they are, and no more than Kubernetes and the offline check understand.

use std::collections::BTreeSet;
use std::path::Path;

use kube::core::cel::compile_schema;
use sensorium_api::crds::{GENERATE, definitions};
use sensorium_api::reference;
use serde_json::Value;

#[test]
fn the_committed_definitions_are_the_generated_ones() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crds");
    let generated = definitions().unwrap();
    for definition in &generated {
        let committed = std::fs::read_to_string(folder.join(&definition.file_name)).unwrap_or_default();
        assert!(
            committed == definition.to_yaml().unwrap(),
            "crds/{} is not what the types say; run: {GENERATE}",
            definition.file_name
        );
    }
    let files = std::fs::read_dir(folder).unwrap().count();
    assert_eq!(files, generated.len(), "crds/ holds files that no kind generates");
}

#[test]
fn the_committed_reference_is_the_generated_one() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(reference::FILE_NAME);
    let committed = std::fs::read_to_string(file).unwrap_or_default();
    let generated = reference::markdown(&definitions().unwrap());
    assert!(committed == generated, "docs/{} is not what the types say; run: {GENERATE}", reference::FILE_NAME);
}

#[test]
fn every_kind_has_a_status_a_category_a_short_name_and_columns() {
    for definition in definitions().unwrap() {
        let spec = &definition.definition["spec"];
        let version = &spec["versions"][0];
        assert_eq!(spec["scope"], "Namespaced", "{}", definition.kind);
        assert_eq!(spec["names"]["categories"][0], "sensorium", "{}", definition.kind);
        assert_eq!(spec["names"]["shortNames"].as_array().unwrap().len(), 1, "{}", definition.kind);
        assert!(version["subresources"]["status"].is_object(), "{}", definition.kind);
        assert!(version["additionalPrinterColumns"].as_array().unwrap().len() >= 4, "{}", definition.kind);
        let status = &definition.schema()["properties"]["status"]["properties"];
        assert!(status["observedGeneration"].is_object() && status["conditions"].is_object(), "{}", definition.kind);
    }
}

#[test]
fn a_definition_fits_into_kubectls_annotation() {
    // `kubectl apply` keeps the last applied object in an annotation of at most 262,144 bytes.
    for definition in definitions().unwrap() {
        let bytes = definition.definition.to_string().len();
        assert!(bytes < 200_000, "{} has {bytes} bytes", definition.file_name);
    }
}

#[test]
fn every_keyword_of_the_schemas_is_one_that_the_offline_check_looks_at() {
    let known = BTreeSet::from([
        // Looked at.
        "additionalProperties",
        "default",
        "enum",
        "items",
        "maxItems",
        "maxLength",
        "maximum",
        "minItems",
        "minLength",
        "minimum",
        "nullable",
        "oneOf",
        "properties",
        "required",
        "type",
        "x-kubernetes-int-or-string",
        "x-kubernetes-list-map-keys",
        "x-kubernetes-list-type",
        "x-kubernetes-validations",
        // For readers only; the integer formats admit nothing that the type and its bounds do not.
        "description",
        "format",
        "title",
    ]);
    for definition in definitions().unwrap() {
        walk(definition.schema(), "", &mut |path, schema| {
            for keyword in schema.as_object().unwrap().keys() {
                assert!(known.contains(keyword.as_str()), "{}{path} uses {keyword}", definition.kind);
            }
            if let Some(branches) = schema["oneOf"].as_array() {
                for branch in branches {
                    assert_eq!(branch.as_object().unwrap().keys().collect::<Vec<_>>(), ["required"], "{path}");
                }
            }
        });
    }
}

#[test]
fn every_integer_has_a_format_that_kubernetes_knows_and_a_range() {
    for definition in definitions().unwrap() {
        walk(&definition.schema()["properties"]["spec"], ".spec", &mut |path, schema| {
            // A toleration is Kubernetes' own type, and a negative time means something there.
            if schema["type"] == "integer" && !path.ends_with("tolerationSeconds") {
                assert!(matches!(schema["format"].as_str(), Some("int32" | "int64")), "{}{path}", definition.kind);
                assert!(schema["minimum"].is_number(), "{}{path} has no minimum", definition.kind);
            }
        });
    }
}

#[test]
fn every_field_is_documented() {
    for definition in definitions().unwrap() {
        for part in ["spec", "status"] {
            walk(&definition.schema()["properties"][part], "", &mut |path, schema| {
                for (name, property) in schema["properties"].as_object().into_iter().flatten() {
                    assert!(property["description"].is_string(), "{} {part}{path}.{name}", definition.kind);
                }
            });
        }
    }
}

/// A schema keeps the names of an enum's values and drops what is said of each.
#[test]
fn a_field_that_is_a_choice_describes_every_value() {
    for definition in definitions().unwrap() {
        // What datatypes there are, and which kinds, needs no explanation.
        walk(&definition.schema()["properties"]["spec"], ".spec", &mut |path, schema| {
            let values = schema["enum"].as_array().into_iter().flatten().filter_map(Value::as_str);
            if !path.ends_with(".datatype") && !path.ends_with(".job.kind") {
                for value in values {
                    let described = schema["description"].as_str().unwrap().contains(&format!("`{value}`"));
                    assert!(described, "{}{path} does not say what `{value}` means", definition.kind);
                }
            }
        });
    }
}

#[test]
fn every_rule_compiles_and_says_what_would_be_right() {
    for definition in definitions().unwrap() {
        walk(definition.schema(), "", &mut |path, schema| {
            let compiled = compile_schema(schema);
            assert!(!compiled.has_errors(), "{}{path}: {:?}", definition.kind, compiled.compilation_errors());
            for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
                let message = rule["message"].is_string() || rule["messageExpression"].is_string();
                assert!(message, "{}{path}: {rule} has no message", definition.kind);
                // An API server does not bound the length of a number turned into text, reckons with the worst, and
                // refuses the definition.
                let expression = rule["messageExpression"].as_str().unwrap_or_default();
                assert!(!expression.contains("string("), "{}{path}: {expression} costs too much", definition.kind);
            }
        });
    }
}

/// Rules cost what the longest value costs, and an API server refuses a definition whose rules may cost too much.
#[test]
fn whatever_a_rule_looks_at_is_bounded() {
    for definition in definitions().unwrap() {
        walk(&definition.schema()["properties"]["spec"], ".spec", &mut |path, schema| {
            let has_rule = schema["x-kubernetes-validations"].is_array();
            if has_rule && schema["type"] == "string" {
                assert!(schema["maxLength"].is_number(), "{}{path}", definition.kind);
            }
            if has_rule && schema["type"] == "array" {
                assert!(schema["maxItems"].is_number(), "{}{path}", definition.kind);
            }
        });
    }
}

fn walk(schema: &Value, path: &str, visit: &mut dyn FnMut(&str, &Value)) {
    visit(path, schema);
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        walk(property, &format!("{path}.{name}"), visit);
    }
    for (keyword, mark) in [("items", "[]"), ("additionalProperties", "{}")] {
        if schema[keyword].is_object() {
            walk(&schema[keyword], &format!("{path}{mark}"), visit);
        }
    }
}
