//! The reference of all fields, as Markdown: what `kubectl explain` says, on one page that can be searched and linked to.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::{Value, json};

use crate::crds::{Definition, GENERATE, default_sentence};

/// File below `docs/` that holds the reference.
pub const FILE_NAME: &str = "reference.md";

/// The page: a chapter per kind, a section with a table per object. An object with the fields of an earlier one, such as
/// the `scheduling` of every kind, has no section of its own: it links to the earlier one.
pub fn markdown(definitions: &[Definition]) -> String {
    let mut page = Page { text: introduction(definitions), sections: BTreeMap::new() };
    for definition in definitions {
        page.kind(definition);
    }
    page.text
}

fn introduction(definitions: &[Definition]) -> String {
    let mut kinds = String::new();
    for Definition { kind, definition, .. } in definitions {
        let short = &definition["spec"]["names"]["shortNames"][0];
        let short = short.as_str().unwrap_or_default();
        let _ = writeln!(kinds, "- [{kind}](#{}) (`{short}`): {}", anchor(kind), prose(description_of(definition)));
    }
    format!(
        "# Reference\n\n\
         <!-- Generated from api/src by `{GENERATE}`; do not edit. -->\n\n\
         Every field of every kind of the API `{}`. `kubectl explain trainingjob.spec` says the same, for the version that \
         a cluster has. [quickstart.md](quickstart.md) has a first job, [operations.md](operations.md) what the conditions mean, \
         [examples/](../examples) whole manifests.\n\n{kinds}\n\
         A field without a default may be left out unless it is **required**; an object that is left out has the \
         defaults of its fields. Rules are checked when an object is applied, and offline by `sensorium plan FILE`; a rule \
         that is broken says so in the words given here, with the value in the place of VALUE. Nobody but the operator \
         writes a `status`.\n",
        crate::API_VERSION,
    )
}

/// The sentence that a kind starts with.
fn description_of(definition: &Value) -> &Value {
    &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["description"]
}

struct Page {
    text: String,
    /// The section of each object that was described, by what the object is.
    sections: BTreeMap<String, String>,
}

impl Page {
    fn kind(&mut self, definition: &Definition) {
        let kind = &definition.kind;
        let _ = writeln!(self.text, "\n## {kind}\n\n{}", prose(description_of(&definition.definition)));
        for part in ["spec", "status"] {
            let schema = &definition.schema()["properties"][part];
            self.section(&format!("{kind}.{part}"), schema);
        }
    }

    /// The section of an object, and then those of the objects in it.
    fn section(&mut self, path: &str, schema: &Value) {
        self.sections.insert(shape(schema), path.to_owned());
        let _ = writeln!(self.text, "\n### {path}\n\n{}\n", prose(&schema["description"]));
        for rule in rules(schema) {
            let _ = writeln!(self.text, "Rule: {rule}.\n");
        }
        self.text.push_str("| Field | Type | Default | Meaning |\n|---|---|---|---|\n");
        let mut nested = Vec::new();
        let mut fields: Vec<_> = schema["properties"].as_object().into_iter().flatten().collect();
        fields.sort_by_key(|(name, _)| !is_required(schema, name));
        for (name, field) in fields {
            let link = object_in(field).map(|(object, mark)| {
                let section = self.sections.get(&shape(object)).cloned().unwrap_or_else(|| {
                    let section = format!("{path}.{name}{mark}");
                    self.sections.insert(shape(object), section.clone());
                    nested.push((section.clone(), object));
                    section
                });
                format!("[object](#{})", anchor(&section))
            });
            let is_status = path.split('.').nth(1) == Some("status");
            let type_ = type_of(field, link.as_deref(), !is_status);
            let default = default_of(schema, name, field);
            let rules = if object_in(field).is_some() { Vec::new() } else { self::rules(field) };
            let meaning = prose(&field["description"]);
            // The default has a column of its own.
            let said = field.as_object().map(default_sentence).unwrap_or_default();
            let meaning = meaning.strip_suffix(&said).unwrap_or(&meaning).to_owned();
            let meaning = rules.iter().fold(meaning, |text, rule| format!("{text} Rule: {rule}."));
            let _ = writeln!(self.text, "| `{name}` | {type_} | {default} | {} |", meaning.replace('|', "\\|"));
        }
        for (section, object) in nested {
            self.section(&section, object);
        }
    }
}

/// The object that a field is, or is a list or a map of, and how its path is marked then.
fn object_in(field: &Value) -> Option<(&Value, &'static str)> {
    [(field, ""), (&field["items"], "[]"), (&field["additionalProperties"], "{}")]
        .into_iter()
        .find(|(schema, _)| schema["properties"].is_object())
}

/// What two objects have in common that need one description only.
fn shape(object: &Value) -> String {
    json!([object["properties"], object["required"], object["oneOf"], object["x-kubernetes-validations"]]).to_string()
}

/// A type with the limits of its values.
fn type_of(schema: &Value, object: Option<&str>, limits: bool) -> String {
    if let Some(values) = schema["enum"].as_array() {
        let values: Vec<String> = values.iter().filter(|value| !value.is_null()).map(code).collect();
        return if values.len() == 1 { values[0].clone() } else { format!("one of {}", values.join(", ")) };
    }
    if schema["x-kubernetes-int-or-string"] == true {
        return "quantity".to_owned();
    }
    let range = |least: &str, most: &str, unit: &str| {
        let bounds =
            (limits.then(|| number(&schema[least])).flatten(), limits.then(|| number(&schema[most])).flatten());
        match bounds {
            (Some(least), Some(most)) => format!(", {least} to {most}{unit}"),
            (Some(least), None) => format!(", at least {least}{unit}"),
            (None, Some(most)) => format!(", at most {most}{unit}"),
            (None, None) => String::new(),
        }
    };
    match schema["type"].as_str().unwrap_or_default() {
        "array" => {
            let items = type_of(&schema["items"], object, limits);
            let items = if items.contains(", ") { format!("({items})") } else { items };
            format!("list of {items}{}", range("minItems", "maxItems", " items"))
        }
        "object" if schema["additionalProperties"].is_object() => {
            format!("map to {}", type_of(&schema["additionalProperties"], object, limits))
        }
        "object" => object.unwrap_or("object").to_owned(),
        "string" if schema["format"] == "date-time" => "time".to_owned(),
        "string" => format!("string{}", range("minLength", "maxLength", " characters")),
        "integer" => format!("integer{}", range("minimum", "maximum", "")),
        "number" => format!("number{}", range("minimum", "maximum", "")),
        other => other.to_owned(),
    }
}

/// A bound, with its thousands set apart.
fn number(bound: &Value) -> Option<String> {
    let text = bound.to_string();
    let text = bound.is_number().then(|| text.strip_suffix(".0").unwrap_or(&text))?;
    let (sign, digits) = text.strip_prefix('-').map_or(("", text), |digits| ("-", digits));
    let groups: Vec<&str> = digits.as_bytes().rchunks(3).rev().filter_map(|group| str::from_utf8(group).ok()).collect();
    Some(if digits.contains('.') { text.to_owned() } else { format!("{sign}{}", groups.join(",")) })
}

/// What a field has when it is left out.
fn default_of(schema: &Value, name: &str, field: &Value) -> String {
    if is_required(schema, name) {
        return "**required**".to_owned();
    }
    let said = field.as_object().map(default_sentence).unwrap_or_default();
    said.trim_start_matches(" Default: ").trim_end_matches('.').to_owned()
}

fn is_required(schema: &Value, name: &str) -> bool {
    schema["required"].as_array().is_some_and(|names| names.iter().any(|required| required == name))
}

/// What the rules of a schema say when they are broken.
fn rules(schema: &Value) -> Vec<String> {
    let mut rules = Vec::new();
    for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
        let expression =
            rule["messageExpression"].as_str().map(|expression| expression.replace("\" + self + \"", "VALUE"));
        let message = expression.as_deref().map(|message| message.trim_matches('"')).or(rule["message"].as_str());
        let field = rule["fieldPath"].as_str().map(|field| format!("`{}`: ", field.trim_start_matches('.')));
        rules.push(format!("{}{}", field.unwrap_or_default(), message.unwrap_or_default()));
    }
    let branches = schema["oneOf"].as_array().into_iter().flatten();
    let fields: Vec<String> = branches.filter_map(|branch| branch["required"].get(0)).map(code).collect();
    if fields.len() > 1 {
        rules.push(format!("exactly one of {} is set", fields.join(", ")));
    }
    rules
}

fn code(value: &Value) -> String {
    format!("`{}`", value.as_str().map_or_else(|| value.to_string(), str::to_owned))
}

/// A description on one line, as a table wants it.
fn prose(description: &Value) -> String {
    description.as_str().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The anchor that GitHub gives a heading.
fn anchor(heading: &str) -> String {
    heading.to_lowercase().chars().filter(|c| c.is_alphanumeric() || *c == '-' || *c == '_').collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(spec: &Value) -> String {
        let mut page = Page { text: String::new(), sections: BTreeMap::new() };
        page.section("Thing.spec", spec);
        page.text
    }

    #[test]
    fn a_field_has_its_type_limits_default_and_rules() {
        let spec = json!({"description": "A thing.", "required": ["name"], "properties": {
            "name": {"type": "string", "maxLength": 63, "description": "Its\nname.", "x-kubernetes-validations": [
                {"messageExpression": "\"'\" + self + \"' is no name; write a|b\""}]},
            "size": {"type": "integer", "minimum": 1.0, "maximum": 16_777_216.0, "default": 2, "description": "Its size. Default: `2`."},
        }});
        let page = page(&spec);
        assert!(page.contains("| `size` | integer, 1 to 16,777,216 | `2` | Its size. |\n"), "{page}");
        let name = "Meaning |\n|---|---|---|---|\n| `name` | string, at most 63 characters | **required** | Its name. Rule: 'VALUE' is no name; write a\\|b. |";
        assert!(page.contains(name), "what is required comes first: {page}");
    }

    #[test]
    fn an_object_has_a_section_and_one_with_the_same_fields_links_to_it() {
        let part = json!({"type": "object", "description": "A part.", "properties": {"a": {"type": "boolean"}},
            "x-kubernetes-validations": [{"fieldPath": ".a", "message": "must be true"}]});
        let spec = json!({"properties": {"first": part, "others": {"type": "array", "items": part}}});
        let page = page(&spec);
        assert!(page.contains("| `first` | [object](#thingspecfirst) |"), "{page}");
        assert!(page.contains("| `others` | list of [object](#thingspecfirst) |"), "{page}");
        assert_eq!(page.matches("### Thing.spec.first\n\nA part.\n\nRule: `a`: must be true.\n").count(), 1, "{page}");
    }
}
