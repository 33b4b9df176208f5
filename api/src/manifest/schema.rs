//! A value against a structural schema: the keywords that Kubernetes enforces and the generated definitions use. A
//! test holds the definitions to this list, so that no keyword is ever skipped in silence.

use serde_json::{Map, Value};

use super::problem::Cause;

/// A found field and what is wrong with it.
type Found = (String, Cause);

/// Removes nulls where the schema has a default and does not admit null, as the API server does before it fills the
/// defaults in. `optimizer:` with every line below it commented out is such a null.
pub(super) fn prune_null_defaults(schema: &Value, value: &mut Value) {
    match value {
        Value::Object(object) => {
            if let Some(properties) = schema["properties"].as_object() {
                object.retain(|name, child| {
                    let property = &properties.get(name).unwrap_or(&Value::Null);
                    !child.is_null() || property["default"].is_null() || property["nullable"] == true
                });
                for (name, child) in object {
                    prune_null_defaults(properties.get(name).unwrap_or(&Value::Null), child);
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| prune_null_defaults(&schema["items"], item)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Appends everything that is wrong with `value`, which is at `path` and has its defaults filled in.
pub(super) fn check(schema: &Value, value: &Value, path: &str, problems: &mut Vec<Found>) {
    if value.is_null() && schema["nullable"] == true {
        return;
    }
    if let Some(expected) = wrong_type(schema, value) {
        problems.push((path.to_owned(), Cause::WrongType { found: show(value), expected }));
        return;
    }
    check_enum(schema, value, path, problems);
    check_bounds(schema, value, path, problems);
    match value {
        Value::Object(object) => check_object(schema, object, path, problems),
        Value::Array(items) => check_array(schema, items, path, problems),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// What the value should have been, if it is of another type.
fn wrong_type(schema: &Value, value: &Value) -> Option<&'static str> {
    if schema["x-kubernetes-int-or-string"] == true {
        return (!value.is_string() && !value.is_i64()).then_some("a whole number or a string");
    }
    let (right, expected) = match schema["type"].as_str()? {
        "object" => (value.is_object(), "a mapping"),
        "array" => (value.is_array(), "a list"),
        "string" => (value.is_string(), "a string"),
        "boolean" => (value.is_boolean(), "true or false"),
        "integer" => (value.is_i64(), "a whole number"),
        "number" => (value.is_number(), "a number"),
        _ => (false, "of a type that this version knows"),
    };
    (!right).then_some(expected)
}

fn check_enum(schema: &Value, value: &Value, path: &str, problems: &mut Vec<Found>) {
    let Some(allowed) = schema["enum"].as_array() else { return };
    if allowed.contains(value) {
        return;
    }
    let words: Vec<String> = allowed.iter().filter_map(Value::as_str).map(str::to_owned).collect();
    let suggestion = value.as_str().and_then(|word| nearest(word, &words));
    problems.push((path.to_owned(), Cause::NotAllowed { found: show(value), suggestion, allowed: words }));
}

/// Ranges of numbers, lengths of strings, counts of lists and mappings.
fn check_bounds(schema: &Value, value: &Value, path: &str, problems: &mut Vec<Found>) {
    let (size, least, most, unit) = match value {
        Value::Number(number) => (number.as_f64(), "minimum", "maximum", ""),
        Value::String(text) => (Some(text.chars().count() as f64), "minLength", "maxLength", " characters long"),
        Value::Array(items) => (Some(items.len() as f64), "minItems", "maxItems", " items long"),
        Value::Object(object) => (Some(object.len() as f64), "minProperties", "maxProperties", " entries long"),
        Value::Null | Value::Bool(_) => return,
    };
    let Some(size) = size else { return };
    let found = if value.is_number() { show(value) } else { format!("{size}{unit}") };
    if let Some(least) = schema[least].as_f64().filter(|least| size < *least) {
        let bound = format!("at least {least}");
        problems.push((path.to_owned(), Cause::OutOfRange { found: found.clone(), bound }));
    }
    if let Some(most) = schema[most].as_f64().filter(|most| size > *most) {
        let bound = format!("at most {most}");
        problems.push((path.to_owned(), Cause::OutOfRange { found, bound }));
    }
}

fn check_object(schema: &Value, object: &Map<String, Value>, path: &str, problems: &mut Vec<Found>) {
    let no_properties = Map::new();
    let properties = schema["properties"].as_object().unwrap_or(&no_properties);
    for (name, child) in object {
        let child_path = join(path, name);
        if let Some(property) = properties.get(name) {
            check(property, child, &child_path, problems);
        } else if let Some(values) = schema.get("additionalProperties") {
            check(values, child, &child_path, problems);
        } else if !properties.is_empty() {
            let known: Vec<String> = properties.keys().cloned().collect();
            let parent = if path.is_empty() { "the document".to_owned() } else { path.to_owned() };
            problems.push((child_path, Cause::UnknownField { suggestion: nearest(name, &known), parent, known }));
        }
    }
    check_required(schema, properties, object, path, problems);
    check_one_of(schema, object, path, problems);
}

fn check_required(
    schema: &Value,
    properties: &Map<String, Value>,
    object: &Map<String, Value>,
    path: &str,
    problems: &mut Vec<Found>,
) {
    for name in names(&schema["required"]).into_iter().filter(|name| !object.contains_key(name)) {
        let description =
            properties.get(&name).and_then(|property| property["description"].as_str()).map(first_sentence);
        problems.push((join(path, &name), Cause::Missing { description }));
    }
}

/// `oneOf` as kube writes it for an enum: each branch requires one field.
fn check_one_of(schema: &Value, object: &Map<String, Value>, path: &str, problems: &mut Vec<Found>) {
    let Some(branches) = schema["oneOf"].as_array() else { return };
    let allowed: Vec<String> = branches.iter().flat_map(|branch| names(&branch["required"])).collect();
    let found: Vec<String> = allowed.iter().filter(|name| object.contains_key(*name)).cloned().collect();
    if found.len() != 1 {
        problems.push((path.to_owned(), Cause::NotExactlyOne { found, allowed }));
    }
}

fn check_array(schema: &Value, items: &[Value], path: &str, problems: &mut Vec<Found>) {
    for (i, item) in items.iter().enumerate() {
        check(&schema["items"], item, &format!("{path}[{i}]"), problems);
    }
    for key in names(&schema["x-kubernetes-list-map-keys"]) {
        for (i, item) in items.iter().enumerate() {
            let value = &item[&key];
            if !value.is_null() && items[..i].iter().any(|earlier| earlier[&key] == *value) {
                let cause = Cause::Duplicate { key: key.clone(), value: show(value) };
                problems.push((format!("{path}[{i}]"), cause));
            }
        }
    }
}

fn names(list: &Value) -> Vec<String> {
    list.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

/// A value for a message: JSON, cut short where it is long.
pub(super) fn show(value: &Value) -> String {
    match value {
        Value::Null => "empty".to_owned(),
        Value::Object(_) => "a mapping".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            let text = value.to_string();
            match text.char_indices().nth(80) {
                Some((end, _)) => format!("{}...", &text[..end]),
                None => text,
            }
        }
    }
}

fn first_sentence(text: &str) -> String {
    let text = text.replace('\n', " ");
    match text.find(". ") {
        Some(end) => text[..end].to_owned(),
        None => text.trim_end_matches('.').to_owned(),
    }
}

/// The known name that `word` was most likely meant to be: at most a third of it mistyped, or the same but for case
/// and separators.
pub(super) fn nearest(word: &str, known: &[String]) -> Option<String> {
    let plain = |name: &str| name.replace(['_', '-'], "").to_lowercase();
    known
        .iter()
        .map(|name| (strsim::osa_distance(&plain(word), &plain(name)), name))
        .filter(|(distance, name)| distance * 3 <= name.chars().count().max(3))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name.clone())
}
