//! What a pod may ask for.
//!
//! Whoever may create a pod writes its volumes as he likes, and this plugin runs with more rights than any pod. So what it
//! takes is listed here, and everything else is refused: nothing makes it read a file of its own, use the node's own rights, or
//! call an address that nobody allowed.

use std::collections::{BTreeMap, HashMap};

use sensorium_artifact::{Digest, Location};

use crate::Failure;

/// Attribute with the store: `s3://BUCKET/PREFIX`.
pub const STORE: &str = "store";
/// Attribute with the artifact's digest: `sha256:` and 64 hexadecimal digits.
pub const DIGEST: &str = "digest";

const KEY_ID: &str = "AWS_ACCESS_KEY_ID";
const SECRET_KEY: &str = "AWS_SECRET_ACCESS_KEY";
const ENDPOINTS: [&str; 2] = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"];
const REGIONS: [&str; 2] = ["AWS_REGION", "AWS_DEFAULT_REGION"];
const ANONYMOUS: &str = "AWS_SKIP_SIGNATURE";
/// What a pod's Secret and attributes may say of a store. Not among them: whatever names a file, a role or another service,
/// which would be read, taken or called in the plugin's place.
const SETTINGS: [&str; 10] = [
    KEY_ID,
    SECRET_KEY,
    "AWS_SESSION_TOKEN",
    REGIONS[0],
    REGIONS[1],
    ENDPOINTS[0],
    ENDPOINTS[1],
    "AWS_ALLOW_HTTP",
    "AWS_VIRTUAL_HOSTED_STYLE_REQUEST",
    ANONYMOUS,
];

/// An artifact in a store, and how the pod reads it there.
#[derive(Clone)]
pub struct Wanted {
    /// The store.
    pub store: String,
    /// The artifact.
    pub digest: Digest,
    /// Credentials and settings of the pod.
    pub environment: BTreeMap<String, String>,
}

impl std::fmt::Debug for Wanted {
    // The environment has the credentials.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Wanted").field("store", &self.store).field("digest", &self.digest).finish_non_exhaustive()
    }
}

impl Wanted {
    /// Reads a volume's attributes and Secret. `endpoints` are the stores, other than AWS itself, that may be named.
    ///
    /// # Errors
    /// [`Failure::Invalid`], and [`Failure::Denied`] for an endpoint that is not listed and for missing credentials.
    pub fn read(
        attributes: &HashMap<String, String>,
        secret: &HashMap<String, String>,
        endpoints: &[String],
    ) -> Result<Self, Failure> {
        let attribute = |name: &str| {
            let found = attributes.get(name).map(String::as_str);
            found.ok_or_else(|| Failure::Invalid(format!("the volume has no attribute {name}")))
        };
        let location = Location::parse(attribute(STORE)?)?;
        let Location::S3 { bucket, .. } = &location else {
            return Err(Failure::Invalid(format!("{location} is no bucket; only artifacts in s3:// are fetched here")));
        };
        let is_host =
            |text: &str| text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b));
        if !is_host(bucket) {
            return Err(Failure::Invalid(format!("{bucket} is no name of a bucket")));
        }
        let digest = attribute(DIGEST)?.parse()?;
        let setting = |name: &str| secret.get(name).or_else(|| attributes.get(name)).filter(|value| !value.is_empty());
        let environment: BTreeMap<String, String> =
            SETTINGS.iter().filter_map(|name| Some(((*name).to_owned(), setting(name)?.clone()))).collect();
        for region in REGIONS.iter().filter_map(|name| environment.get(*name)) {
            if !is_host(region) {
                return Err(Failure::Invalid(format!("{region} is no region")));
            }
        }
        for endpoint in ENDPOINTS.iter().filter_map(|name| environment.get(*name)) {
            let bare = |text: &str| text.trim_end_matches('/').to_owned();
            if !endpoints.iter().any(|allowed| bare(allowed) == bare(endpoint)) {
                return Err(Failure::Denied(format!(
                    "the node cache may not call {endpoint}; an administrator allows it with the chart's \
                     nodeCache.endpoints"
                )));
            }
        }
        let anonymous = environment.get(ANONYMOUS).is_some_and(|value| value == "true");
        if !anonymous && [KEY_ID, SECRET_KEY].iter().any(|name| !environment.contains_key(*name)) {
            return Err(Failure::Denied(format!(
                "the volume's Secret has no {KEY_ID} and {SECRET_KEY}; the node's own rights are not used"
            )));
        }
        Ok(Self { store: location.to_string(), digest, environment })
    }

    /// Name of the artifact's place in the cache. Whoever reads it from another store has another one, so files are only
    /// shared between those who may read the same place of the same store.
    pub fn key(&self) -> String {
        let said =
            |names: [&str; 2]| names.iter().find_map(|name| self.environment.get(*name)).map_or("", String::as_str);
        let place = [said(ENDPOINTS).trim_end_matches('/'), said(REGIONS), &self.store, &self.digest.to_string()];
        Digest::of(place.join("\n").as_bytes()).hex()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn attributes() -> HashMap<String, String> {
        let digest = Digest::of(b"x").to_string();
        map(&[(STORE, "s3://models/team-a/"), (DIGEST, &digest), ("csi.storage.k8s.io/pod.name", "vqa")])
    }

    const KEYS: [(&str, &str); 2] = [(KEY_ID, "id"), (SECRET_KEY, "secret")];

    #[test]
    fn a_volume_is_a_store_a_digest_and_the_pods_own_credentials() {
        let wanted = Wanted::read(&attributes(), &map(&KEYS), &[]).unwrap();
        assert_eq!((wanted.store.as_str(), wanted.environment.len()), ("s3://models/team-a", 2));
        assert!(!format!("{wanted:?}").contains("secret"));
    }

    #[test]
    fn nothing_makes_the_plugin_read_files_of_its_own_or_take_a_role() {
        let mut all = attributes();
        for name in ["AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_METADATA_ENDPOINT"] {
            all.insert(name.to_owned(), "/etc/shadow".to_owned());
        }
        let wanted = Wanted::read(&all, &map(&KEYS), &[]).unwrap();
        assert_eq!(wanted.environment.into_keys().collect::<Vec<_>>(), [KEY_ID, SECRET_KEY]);
        let failure = Wanted::read(&attributes(), &map(&[]), &[]).unwrap_err();
        assert!(matches!(&failure, Failure::Denied(text) if text.contains("own rights are not used")), "{failure}");
    }

    #[test]
    fn an_endpoint_has_to_be_allowed() {
        let secret = map(&[KEYS[0], KEYS[1], (ENDPOINTS[1], "http://169.254.169.254/")]);
        let failure = Wanted::read(&attributes(), &secret, &["http://store:9000".to_owned()]).unwrap_err();
        assert!(matches!(failure, Failure::Denied(_)), "{failure}");
        Wanted::read(&attributes(), &secret, &["http://169.254.169.254".to_owned()]).unwrap();
        let mut elsewhere = map(&KEYS);
        elsewhere.insert(REGIONS[0].to_owned(), "x@evil.example/".to_owned());
        assert!(matches!(Wanted::read(&attributes(), &elsewhere, &[]), Err(Failure::Invalid(_))));
    }

    #[test]
    fn other_places_are_refused_with_what_would_be_right() {
        for store in ["pvc://artifacts", "file:///etc", "s3://Bad_Bucket", "s3://", "models"] {
            let mut bad = attributes();
            bad.insert(STORE.to_owned(), store.to_owned());
            assert!(matches!(Wanted::read(&bad, &map(&KEYS), &[]), Err(Failure::Invalid(_))), "{store}");
        }
        let mut bad = attributes();
        bad.insert(DIGEST.to_owned(), "../../etc".to_owned());
        assert!(matches!(Wanted::read(&bad, &map(&KEYS), &[]), Err(Failure::Invalid(_))));
    }

    #[test]
    fn places_of_different_stores_are_different_places() {
        let key = |store: &str, region: &str| {
            let mut attributes = attributes();
            attributes.insert(STORE.to_owned(), store.to_owned());
            attributes.insert(REGIONS[0].to_owned(), region.to_owned());
            Wanted::read(&attributes, &map(&KEYS), &[]).unwrap().key()
        };
        assert_eq!(key("s3://a/b/", "r"), key("s3://a/b", "r"));
        assert_ne!(key("s3://a/b", "r"), key("s3://a/c", "r"));
        assert_ne!(key("s3://a/b", "r"), key("s3://a/b", "s"));
    }
}
