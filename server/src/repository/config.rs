//! A model's configuration as somebody wrote it: `config.pbtxt`, or JSON in a request to load.

use miette::Diagnostic as _;
use prost_reflect::{DynamicMessage, MessageDescriptor, ReflectMessage as _};
use sensorium_proto::inference::ModelConfig;

/// A configuration, and what it says by leaving things out.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Written {
    pub(super) config: ModelConfig,
    /// Whether it has `max_batch_size`: a written 0 means that the model has no batch axis, an absent one that the file
    /// shall tell.
    pub(super) has_batch_size: bool,
}

impl Written {
    /// The same of a model without a batch axis.
    pub(super) fn whole(self) -> Self {
        Self { config: ModelConfig { max_batch_size: 0, ..self.config }, has_batch_size: true }
    }
}

/// The name of the message, for the descriptors.
const MESSAGE: &str = "inference.ModelConfig";

/// Reads the protobuf text format.
///
/// # Errors
/// What is wrong, and in which line.
pub(super) fn from_text(text: &str) -> Result<Written, String> {
    // Editors of Windows begin a file with a mark that says nothing.
    let text = &with_colons(text.trim_start_matches('\u{feff}'));
    let message = DynamicMessage::parse_text_format(descriptor()?, text).map_err(|error| {
        let offset = error.labels().and_then(|mut labels| labels.next()).map(|label| label.offset());
        match offset {
            Some(offset) => format!("line {}: {error}{}", line(text, offset), instead(&error.to_string())),
            None => error.to_string(),
        }
    })?;
    typed(&message, names_batch_size(text))
}

/// The fields or values that there are, for an error that ends with the name of what lacks one.
fn instead(error: &str) -> String {
    let owner = error.rsplit('\'').nth(1).unwrap_or_default();
    let pool = sensorium_proto::descriptor_pool();
    let names: Vec<String> = match (pool.get_enum_by_name(owner), pool.get_message_by_name(owner)) {
        (Some(values), _) => values.values().map(|value| value.name().to_owned()).collect(),
        (None, Some(message)) => message.fields().map(|field| field.name().to_owned()).collect(),
        (None, None) => return String::new(),
    };
    format!("; it has {}", names.join(", "))
}

/// Reads JSON as protobuf spells it.
///
/// # Errors
/// What is wrong, and where.
pub(super) fn from_json(json: &str) -> Result<Written, String> {
    let mut reader = serde_json::Deserializer::from_str(json);
    let message = DynamicMessage::deserialize(descriptor()?, &mut reader).map_err(|error| error.to_string())?;
    reader.end().map_err(|error| error.to_string())?;
    let has_batch_size = json.contains("\"max_batch_size\"") || json.contains("\"maxBatchSize\"");
    typed(&message, has_batch_size)
}

/// Lists of messages as the parser wants them: `input: [ {` for `input [ {`, which the format allows and which is how
/// everybody writes it. Lines stay where they are.
fn with_colons(text: &str) -> String {
    let mut result = String::with_capacity(text.len() + 16);
    // The last character that is neither space nor comment.
    let mut last = ' ';
    for (character, is_code) in marked(text) {
        if is_code && character == '[' && (last.is_ascii_alphanumeric() || last == '_') {
            result.push(':');
        }
        if is_code && !character.is_whitespace() {
            last = character;
        }
        result.push(character);
    }
    result
}

/// The characters of a text, and whether they are neither in a string nor in a comment.
fn marked(text: &str) -> impl Iterator<Item = (char, bool)> {
    let (mut quote, mut is_comment, mut is_escaped) = (None, false, false);
    text.chars().map(move |character| {
        if is_comment {
            is_comment = character != '\n';
            return (character, false);
        }
        match (quote, character) {
            (Some(_), _) if is_escaped => is_escaped = false,
            (Some(_), '\\') => is_escaped = true,
            (Some(open), _) if character == open => quote = None,
            (Some(_), _) => {}
            (None, '"' | '\'') => quote = Some(character),
            (None, '#') => is_comment = true,
            (None, _) => return (character, true),
        }
        (character, false)
    })
}

fn descriptor() -> Result<MessageDescriptor, String> {
    // The pool is made of the same files as the type: if one day it is not, a model fails to load and says so.
    sensorium_proto::descriptor_pool().get_message_by_name(MESSAGE).ok_or_else(|| format!("there is no {MESSAGE}"))
}

fn typed(message: &DynamicMessage, has_batch_size: bool) -> Result<Written, String> {
    let config: ModelConfig =
        message.transcode_to().map_err(|error| format!("it is no {}: {error}", message.descriptor().name()))?;
    // Wherever in a line it stands: only a 0 could be one that nobody wrote.
    let has_batch_size = has_batch_size || config.max_batch_size != 0;
    Ok(Written { config, has_batch_size })
}

/// Whether the text sets the field. Nothing else is called so; a text or a comment may have the words in it.
fn names_batch_size(text: &str) -> bool {
    const NAME: &str = "max_batch_size";
    let code: String = marked(text).filter_map(|(character, is_code)| is_code.then_some(character)).collect();
    code.match_indices(NAME).any(|(start, _)| {
        let is_word = |character: char| character.is_ascii_alphanumeric() || character == '_';
        !code[..start].ends_with(is_word) && code[start + NAME.len()..].trim_start().starts_with(':')
    })
}

/// Lines count from 1.
fn line(text: &str, offset: usize) -> usize {
    text.get(..offset).unwrap_or(text).split('\n').count()
}

#[cfg(test)]
mod tests {
    use sensorium_proto::inference::{DataType, model_config::SchedulingChoice};

    use super::*;

    #[test]
    fn a_file_in_the_text_format_is_read_whole() {
        let written = from_text(
            r#"
            # a comment
            name: "m" platform: 'onnxruntime_onnx'
            max_batch_size: 8
            input [ { name: "x", data_type: TYPE_FP32, dims: [ 3, -1 ] }, { name: "y" data_type: TYPE_STRING dims: 1 } ]
            dynamic_batching { preferred_batch_size: [ 4, 8 ] max_queue_delay_microseconds: 100 }
            parameters { key: "intra_op_thread_count" value: { string_value: "2" } }
            version_policy: { specific { versions: [1, 3] } }
            "#,
        )
        .unwrap();
        let config = written.config;
        assert!(written.has_batch_size);
        assert_eq!((config.name.as_str(), config.max_batch_size, config.input.len()), ("m", 8, 2));
        assert_eq!(
            (config.input[0].dims.as_slice(), config.input[1].data_type()),
            (&[3, -1][..], DataType::TypeString)
        );
        let Some(SchedulingChoice::DynamicBatching(batching)) = config.scheduling_choice else { panic!("dynamic") };
        assert_eq!((batching.preferred_batch_size, batching.max_queue_delay_microseconds), (vec![4, 8], 100));
        assert_eq!(config.parameters["intra_op_thread_count"].string_value, "2");
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_a_file() {
        assert_eq!(from_text("\u{feff}name: \"m\"").unwrap().config.name, "m");
    }

    #[test]
    fn a_batch_size_in_the_middle_of_a_line_is_written_too() {
        let written = from_text("name: \"m\" max_batch_size: 1").unwrap();
        assert_eq!((written.has_batch_size, written.config.max_batch_size), (true, 1));
        assert!(from_text("name: \"m\" platform: \"onnxruntime_onnx\" max_batch_size : 0").unwrap().has_batch_size);
        assert!(!from_text("name: \"max_batch_size: 0\" # max_batch_size: 0").unwrap().has_batch_size);
    }

    #[test]
    fn brackets_in_strings_and_comments_are_left_alone() {
        let text = "a [1] # b [2]\nc: \"d [3] \\\" e [4]\" f\n[5] g: [6]";
        assert_eq!(with_colons(text), "a :[1] # b [2]\nc: \"d [3] \\\" e [4]\" f\n:[5] g: [6]");
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let error = from_text("name: \"m\"\nmax_batch: 8\n").unwrap_err();
        assert!(error.starts_with("line 2: ") && error.contains("'max_batch'"), "{error}");
        assert!(error.contains("; it has name, platform, ") && error.contains("max_batch_size, input"), "{error}");
        let error = from_text("input {\n  data_type: TYPE_FLOAT\n}").unwrap_err();
        assert!(error.starts_with("line 2: ") && error.contains("TYPE_FLOAT"), "{error}");
        assert!(error.contains("; it has TYPE_INVALID, TYPE_BOOL, ") && error.contains("TYPE_FP32"), "{error}");
        let error = from_text("max_batch_size: \"many\"").unwrap_err();
        assert!(error.starts_with("line 1: "), "{error}");
    }

    #[test]
    fn json_is_the_same_message() {
        let written =
            from_json(r#"{"max_batch_size": 0, "instance_group": [{"count": 2, "kind": "KIND_CPU"}]}"#).unwrap();
        assert!(written.has_batch_size);
        assert_eq!(written.config.instance_group[0].count, 2);
        assert!(from_json(r#"{"max_batch": 8}"#).unwrap_err().contains("max_batch"));
        assert!(!from_json("{}").unwrap().has_batch_size);
    }
}
