//! Conditions: a list in which each type is there once, from the first visit on.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

/// Whether a condition holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Truth {
    /// It does.
    True,
    /// It does not.
    False,
    /// Not known yet.
    Unknown,
}

impl Truth {
    fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

impl From<bool> for Truth {
    fn from(holds: bool) -> Self {
        if holds { Self::True } else { Self::False }
    }
}

/// Kubernetes' bound on a condition's message.
const LONGEST: usize = 32_768;

/// Writes conditions of one generation at one time.
#[derive(Debug)]
pub struct Conditions<'a> {
    list: &'a mut Vec<Condition>,
    generation: Option<i64>,
    now: Timestamp,
}

impl<'a> Conditions<'a> {
    /// Every one of `types` is there afterwards; those that were not are unknown.
    pub fn new(list: &'a mut Vec<Condition>, types: &[&str], generation: Option<i64>, now: Timestamp) -> Self {
        let mut conditions = Self { list, generation, now };
        for name in types {
            if conditions.find(name).is_none() {
                conditions.set(name, Truth::Unknown, "Pending", "not looked at yet");
            }
        }
        conditions
    }

    /// Sets one. The time of its last transition changes with its truth only.
    pub fn set(&mut self, name: &str, truth: impl Into<Truth>, reason: &str, message: impl Into<String>) {
        let status = truth.into().as_str();
        let mut message: String = message.into();
        if let Some((end, _)) = message.char_indices().nth(LONGEST) {
            message.truncate(end);
        }
        let (now, generation) = (self.now, self.generation);
        let condition = Condition {
            type_: name.to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            message,
            observed_generation: generation,
            last_transition_time: Time(now),
        };
        match self.list.iter_mut().find(|known| known.type_ == name) {
            Some(known) => {
                let since = if known.status == status { known.last_transition_time.clone() } else { Time(now) };
                *known = Condition { last_transition_time: since, ..condition };
            }
            None => self.list.push(condition),
        }
    }

    fn find(&self, name: &str) -> Option<&Condition> {
        self.list.iter().find(|condition| condition.type_ == name)
    }
}

/// Whether the condition `name` is true.
pub fn is_true(list: &[Condition], name: &str) -> bool {
    list.iter().any(|condition| condition.type_ == name && condition.status == "True")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_the_last_transition_changes_with_the_truth_only() {
        let (early, late) = (Timestamp::from_second(10).unwrap(), Timestamp::from_second(20).unwrap());
        let mut list = Vec::new();
        Conditions::new(&mut list, &["Ready"], Some(1), early).set("Ready", false, "Starting", "one of two");
        Conditions::new(&mut list, &["Ready"], Some(1), late).set("Ready", false, "Starting", "two of two");
        assert_eq!((list[0].last_transition_time.0, list[0].message.as_str()), (early, "two of two"));
        Conditions::new(&mut list, &["Ready"], Some(2), late).set("Ready", true, "Answering", "");
        assert_eq!((list[0].last_transition_time.0, list[0].observed_generation), (late, Some(2)));
        assert!(is_true(&list, "Ready"));
    }

    #[test]
    fn every_type_is_there_from_the_first_visit() {
        let mut list = Vec::new();
        Conditions::new(&mut list, &["A", "B"], None, Timestamp::UNIX_EPOCH);
        assert_eq!(
            list.iter().map(|c| (c.type_.as_str(), c.status.as_str())).collect::<Vec<_>>(),
            [("A", "Unknown"), ("B", "Unknown")]
        );
    }
}
