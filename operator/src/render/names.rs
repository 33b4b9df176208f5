//! Names and labels of children.

use std::collections::BTreeMap;

use sensorium_api::run::JobKey;
use sha2::{Digest, Sha256};

/// Value of `app.kubernetes.io/managed-by`; the operator looks at nothing else.
pub const MANAGED_BY: &str = "sensorium";
/// Label with the owner's kind.
pub const KIND_LABEL: &str = "sensorium.dev/kind";
/// Label with the owner's name, shortened as [`child_name`] does where it is too long for a label.
pub const NAME_LABEL: &str = "sensorium.dev/name";
/// Label with the part that an object plays among its owner's children.
pub(crate) const COMPONENT_LABEL: &str = "app.kubernetes.io/component";
/// Label with the number of the attempt.
pub const ATTEMPT_LABEL: &str = "sensorium.dev/attempt";
/// Annotation of a pod with the name of the resource that it works for, in full.
pub const OWNER_ANNOTATION: &str = "sensorium.dev/owner";
/// Annotation of a pod of an Indexed Job, which Kubernetes sets: its number.
pub(crate) const COMPLETION_INDEX: &str = "batch.kubernetes.io/job-completion-index";
/// Longest label value, and longest name of a Service. A pod of an Indexed Job has the Job's name and its index as host
/// name, under the same limit.
const LONGEST: usize = 63;
/// Room that the index of a pod (`-9999`) takes in its host name.
const INDEX: usize = 6;

/// `OWNER-SUFFIX`, no longer than a host name may be with a pod's index behind it. A long owner is cut, and made unique
/// again by a digest of its whole name.
pub fn child_name(owner: &str, suffix: &str) -> String {
    let name = if suffix.is_empty() { owner.to_owned() } else { format!("{owner}-{suffix}") };
    // A Service's name is a DNS label, which has no dots; an owner's may.
    let name = name.replace('.', "-");
    let limit = LONGEST - INDEX;
    if name.len() <= limit && !owner.contains('.') {
        return name;
    }
    let digest = short_digest(owner);
    let room = limit - suffix.len() - digest.len() - 2;
    let head: String = owner.replace('.', "-").chars().take(room).collect();
    let head = head.trim_end_matches('-');
    if suffix.is_empty() { format!("{head}-{digest}") } else { format!("{head}-{digest}-{suffix}") }
}

/// As [`child_name`], for what has a Service: its name starts with a letter, as DNS had it first.
pub fn service_name(owner: &str, suffix: &str) -> String {
    if owner.starts_with(|c: char| c.is_ascii_digit()) {
        child_name(&format!("s-{owner}-{}", short_digest(owner)), suffix)
    } else {
        child_name(owner, suffix)
    }
}

/// Eight hexadecimal digits of the text's SHA-256.
pub(crate) fn short_digest(text: &str) -> String {
    Sha256::digest(text.as_bytes())[..4].iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"))
}

/// The labels of every child of `job`.
pub fn labels(job: &JobKey, component: &str) -> BTreeMap<String, String> {
    let mut labels = selector(job);
    labels.insert(COMPONENT_LABEL.to_owned(), component.to_owned());
    labels.insert("app.kubernetes.io/managed-by".to_owned(), MANAGED_BY.to_owned());
    labels
}

/// The labels by which the pods of `job` are told from all others.
pub fn selector(job: &JobKey) -> BTreeMap<String, String> {
    let name = if job.name.len() > LONGEST { child_name(&job.name, "") } else { job.name.clone() };
    BTreeMap::from([(KIND_LABEL.to_owned(), job.kind.to_string()), (NAME_LABEL.to_owned(), name)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_short_name_is_kept_and_a_long_one_cut_and_told_apart() {
        assert_eq!(child_name("vqa", "worker-1"), "vqa-worker-1");
        assert_eq!(child_name("vqa", ""), "vqa");
        let (one, other) = ("a".repeat(70) + "1", "a".repeat(70) + "2");
        assert_ne!(child_name(&one, "worker-1"), child_name(&other, "worker-1"));
        assert_ne!(child_name("a.b", "worker"), child_name("a-b", "worker"));
    }

    #[test]
    fn the_name_of_a_service_starts_with_a_letter_and_no_other_job_has_it() {
        assert_eq!(service_name("vqa", "worker"), "vqa-worker");
        let name = service_name("3d", "");
        assert!(name.starts_with("s-3d-") && name != service_name("s-3d", ""), "{name}");
    }

    proptest! {
        #[test]
        fn every_name_is_a_dns_label_with_room_for_an_index(
            owner in "[a-z0-9]([-a-z0-9.]{0,250}[a-z0-9])?", attempt in 1u32..100_000,
        ) {
            let name = child_name(&owner, &format!("compressor-{attempt}"));
            prop_assert!(name.len() + INDEX <= LONGEST, "{name}");
            prop_assert!(name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'), "{name}");
            prop_assert!(!name.starts_with('-') && !name.ends_with('-'), "{name}");
        }
    }
}
