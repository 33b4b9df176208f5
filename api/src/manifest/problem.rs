//! What can be wrong with a manifest, said so that its author can act on it.

use std::fmt;

/// Everything that is wrong with a file, in the order of the file's documents; never empty.
#[derive(Clone, Debug, PartialEq)]
pub struct ManifestError {
    /// The problems.
    pub problems: Vec<Problem>,
}

impl std::error::Error for ManifestError {}

/// One problem per line.
impl fmt::Display for ManifestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.problems.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}

/// One thing that is wrong, and where.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// The file as the caller named it.
    pub file: String,
    /// Which of the file's documents, counted from 1.
    pub document: usize,
    /// `TrainingJob/vqa`, as far as the document says so.
    pub resource: Option<String>,
    /// Path of the field, such as `spec.tasks[0].weight`; empty for the document as a whole.
    pub field: String,
    /// What is wrong there.
    pub cause: Cause,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: document {}", self.file, self.document)?;
        if let Some(resource) = &self.resource {
            write!(f, " ({resource})")?;
        }
        if !self.field.is_empty() {
            write!(f, ": {}", self.field)?;
        }
        write!(f, ": {}", self.cause)
    }
}

/// What is wrong with a field. Values are shown as JSON.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Cause {
    /// The text is not YAML.
    #[error("is not YAML: {message}")]
    NotYaml {
        /// The parser's words, with line and column.
        message: String,
    },
    /// No such kind.
    #[error("is {found}, which is not a kind of sensorium.dev{}; use one of {}", guess(.suggestion.as_deref()), .known.join(", "))]
    UnknownKind {
        /// What was found.
        found: String,
        /// A known kind with nearly that name.
        suggestion: Option<String>,
        /// All kinds.
        known: Vec<String>,
    },
    /// Another group or version.
    #[error("is {found}, must be \"{}\"", crate::API_VERSION)]
    WrongApiVersion {
        /// What was found.
        found: String,
    },
    /// A field that no program would read.
    #[error("there is no such field{}; {parent} has {}", guess(.suggestion.as_deref()), .known.join(", "))]
    UnknownField {
        /// A known field with nearly that name.
        suggestion: Option<String>,
        /// What the field is in.
        parent: String,
        /// The fields there are.
        known: Vec<String>,
    },
    /// A field without which nothing can run.
    #[error("is missing{}", what(.description.as_deref()))]
    Missing {
        /// First sentence of the field's documentation.
        description: Option<String>,
    },
    /// A string where a number belongs, or the like.
    #[error("is {found}, must be {expected}")]
    WrongType {
        /// What was found.
        found: String,
        /// What would be right.
        expected: &'static str,
    },
    /// A word that is not one of the few that mean something here.
    #[error("is {found}{}, must be {}", guess(.suggestion.as_deref()), one_of(.allowed))]
    NotAllowed {
        /// What was found.
        found: String,
        /// An allowed value with nearly that name.
        suggestion: Option<String>,
        /// The values there are.
        allowed: Vec<String>,
    },
    /// A number, length or count outside of its range.
    #[error("is {found}, must be {bound}")]
    OutOfRange {
        /// What was found.
        found: String,
        /// The bound that it breaks, in words.
        bound: String,
    },
    /// None or several of the fields of which there must be exactly one.
    #[error("has {}, must have exactly one of {}", if .found.is_empty() { "none".to_owned() } else { .found.join(" and ") }, .allowed.join(", "))]
    NotExactlyOne {
        /// The fields found.
        found: Vec<String>,
        /// The fields to choose from.
        allowed: Vec<String>,
    },
    /// Two items of a list with the same key.
    #[error("{key} is {value} again; each may be there once")]
    Duplicate {
        /// The field that tells the items apart.
        key: String,
        /// Its value.
        value: String,
    },
    /// A rule of the kind's definition does not hold.
    #[error("{}", rule(.message, .values))]
    Rule {
        /// The rule's own words.
        message: String,
        /// What the fields that the rule looks at hold, by their path below the rule; an empty path is the field
        /// itself. Empty where the rule's words say it already.
        values: Vec<(String, String)>,
    },
    /// Part of the API that this version cannot run.
    #[error("is {found}, which is not available yet; use {instead}")]
    NotAvailable {
        /// What was found.
        found: String,
        /// What works today.
        instead: &'static str,
    },
    /// The document passed every check but is no object of its kind: the definitions and the types disagree.
    #[error("cannot be read: {message}")]
    Undecodable {
        /// The decoder's words.
        message: String,
    },
}

fn guess(suggestion: Option<&str>) -> String {
    suggestion.map(|name| format!(" (did you mean `{name}`?)")).unwrap_or_default()
}

fn what(description: Option<&str>) -> String {
    description.map(|text| format!(": {text}")).unwrap_or_default()
}

fn rule(message: &str, values: &[(String, String)]) -> String {
    match values {
        [] => message.to_owned(),
        [(path, value)] if path.is_empty() => format!("is {value}, {message}"),
        several => {
            let several: Vec<String> = several.iter().map(|(path, value)| format!("{path} is {value}")).collect();
            format!("{message} ({})", several.join(", "))
        }
    }
}

fn one_of(allowed: &[String]) -> String {
    match allowed {
        [only] => only.clone(),
        several => format!("one of {}", several.join(", ")),
    }
}
