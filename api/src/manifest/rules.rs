//! The CEL rules of a schema, run by the evaluator of the kube project.

use kube::core::cel::Validator;
use serde_json::{Map, Value};

use super::problem::Cause;
use super::schema::show;

/// Everything that `document`, which fits the schema and has its defaults filled in, breaks of the schema's rules.
pub(super) fn check(schema: &Value, document: &Value) -> Vec<(String, Cause)> {
    let Err(errors) = Validator::new().validate(schema, document, None) else { return Vec::new() };
    let errors = errors.into_vec().into_iter();
    errors
        .map(|error| {
            let values = find_rule(schema, &error.rule)
                .filter(|rule| !rule.contains_key("messageExpression"))
                .map(|rule| {
                    let below = rule.get("fieldPath").and_then(Value::as_str).unwrap_or_default();
                    let place = error.field_path.strip_suffix(below).unwrap_or_default();
                    looked_at(&error.rule, at(document, place))
                })
                .unwrap_or_default();
            (error.field_path, Cause::Rule { message: error.message, values })
        })
        .collect()
}

/// The first rule of the schema with this text. Where a text is used twice, its other properties are the same.
fn find_rule<'a>(schema: &'a Value, text: &str) -> Option<&'a Map<String, Value>> {
    match schema {
        Value::Object(object) if object.get("rule").is_some_and(|rule| rule == text) => Some(object),
        Value::Object(object) => object.values().find_map(|child| find_rule(child, text)),
        Value::Array(items) => items.iter().find_map(|child| find_rule(child, text)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => None,
    }
}

/// Paths and values of the scalars that a rule reads from `this`. A rule's message cannot show numbers itself: an API
/// server refuses the definition, because it does not bound the length of a number turned into text.
fn looked_at(rule: &str, this: &Value) -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = Vec::new();
    for after in rule.split("self").skip(1) {
        let end = after.find(|c: char| !c.is_ascii_alphanumeric() && c != '.').unwrap_or(after.len());
        let (mut path, rest) = after.split_at(end);
        if rest.starts_with('(') {
            // A call, such as `self.tasks.exists(`: its last word is the function.
            path = path.rsplit_once('.').map_or("", |(before, _)| before);
        }
        let path = path.trim_start_matches('.');
        let value = at(this, path);
        let is_scalar = value.is_number() || value.is_string() || value.is_boolean();
        if is_scalar && !found.iter().any(|(earlier, _)| earlier == path) {
            found.push((path.to_owned(), show(value)));
        }
    }
    found
}

/// The value at a path such as `spec.tasks[0].weight`; null where there is none.
fn at<'a>(value: &'a Value, path: &str) -> &'a Value {
    path.split(['.', '[']).filter(|segment| !segment.is_empty()).fold(value, |value, segment| {
        match segment.strip_suffix(']').and_then(|index| index.parse::<usize>().ok()) {
            Some(index) => &value[index],
            None => &value[segment],
        }
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_rule_shows_the_scalars_it_reads_once_each() {
        let this = json!({"workers": 3, "parallelism": {"data": 2}, "tasks": [{"type": "vqa"}]});
        let rule = "self.parallelism.data * self.parallelism.data == self.workers && self.tasks.all(t, t.weight > 0)";
        let pair = |path: &str, value: &str| (path.to_owned(), value.to_owned());
        assert_eq!(looked_at(rule, &this), [pair("parallelism.data", "2"), pair("workers", "3")]);
        assert_eq!(looked_at("self > 0.0", &json!(-1.5)), [pair("", "-1.5")]);
        assert_eq!(looked_at("size(self) > 0", &json!([])), []);
    }

    #[test]
    fn a_path_leads_through_mappings_and_lists() {
        let document = json!({"spec": {"tasks": [{"weight": 1}, {"weight": 2}]}});
        assert_eq!(at(&document, "spec.tasks[1].weight"), &json!(2));
        assert_eq!(at(&document, "spec.tasks[7].weight"), &Value::Null);
        assert_eq!(at(&document, ""), &document);
    }
}
