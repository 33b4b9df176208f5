//! The client of a bucket, from the `AWS_*` variables.

use std::collections::HashMap;
use std::time::Duration;

use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey};
use object_store::path::Path as Key;
use object_store::{ClientConfigKey, ClientOptions};
use url::{Host, Url};

use crate::{ArtifactError, Location};

/// How long a server may say nothing, before an answer or within one. A whole answer may take any time: that is for the size
/// of a file and the network to say.
const IDLE: Duration = Duration::from_secs(30);

const ALLOW_HTTP: AmazonS3ConfigKey = AmazonS3ConfigKey::Client(ClientConfigKey::AllowHttp);

/// A variable that cannot be used.
#[derive(Debug, thiserror::Error)]
enum VariableError {
    #[error("{name} is {value:?}; write http://HOST:PORT or https://HOST:PORT")]
    Malformed { name: String, value: String },
    #[error("{name} is {value:?}: plain HTTP to another machine needs AWS_ALLOW_HTTP=true; or write https://HOST:PORT")]
    PlainHttp { name: String, value: String },
    #[error("{name} has a user in it; write http://HOST:PORT or https://HOST:PORT, and who asks as AWS_ACCESS_KEY_ID")]
    User { name: String },
    // Without the value, which may be secret.
    #[error(
        "{name} has a blank or the end of a line around it, or a control character in it, as what comes of a file often has; remove it"
    )]
    Blank { name: String },
}

impl From<VariableError> for object_store::Error {
    fn from(error: VariableError) -> Self {
        Self::Generic { store: "S3", source: Box::new(error) }
    }
}

/// The variables of this process. One that is not Unicode is none of ours; `vars` would panic on it.
pub(crate) fn environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}

/// A client of `bucket`, and `prefix` as it takes it. `environment` gives the `AWS_*` variables: credentials, region,
/// endpoint and the rest.
pub(crate) fn client(
    bucket: &str,
    prefix: &str,
    environment: impl Iterator<Item = (String, String)>,
) -> Result<(AmazonS3, Key), ArtifactError> {
    let uri = Location::S3 { bucket: bucket.to_owned(), prefix: prefix.to_owned() }.to_string();
    // Parsed, for `Key::from` would encode it, and the client does so again in every request. A location has no other
    // fault that a key must not have.
    let Ok(prefix) = Key::parse(prefix) else {
        return Err(ArtifactError::InvalidUri { uri, reason: "its path has a control character" });
    };
    let client = builder(environment).and_then(|builder| builder.with_bucket_name(bucket).build());
    match client {
        Ok(client) => Ok((client, prefix)),
        Err(error) => Err(ArtifactError::Remote { action: "set up the S3 client for", uri, error }),
    }
}

fn builder(environment: impl Iterator<Item = (String, String)>) -> Result<AmazonS3Builder, object_store::Error> {
    // Other AWS tools have variables that this client does not know: they are not ours to judge.
    let settings: HashMap<AmazonS3ConfigKey, (String, String)> = environment
        // An empty one is as good as none, as templates make them.
        .filter(|(name, value)| name.starts_with("AWS_") && !value.is_empty())
        .filter_map(|(name, value)| Some((name.to_ascii_lowercase().parse().ok()?, (name, value))))
        .collect();
    let is_address =
        |key: &AmazonS3ConfigKey| matches!(key, AmazonS3ConfigKey::S3Endpoint | AmazonS3ConfigKey::Endpoint);
    let is_blank = |value: &str| value.trim() != value || value.contains(char::is_control);
    let mut others = settings.iter().filter(|(key, _)| !is_address(key)).map(|(_, setting)| setting);
    if let Some((name, _)) = others.find(|(_, value)| is_blank(value)) {
        return Err(VariableError::Blank { name: name.clone() }.into());
    }
    let options = ClientOptions::new().with_timeout_disabled().with_read_timeout(IDLE);
    let builder = AmazonS3Builder::new().with_client_options(options);
    let builder = settings.iter().fold(builder, |builder, (key, (_, value))| builder.with_config(*key, value));
    // The client panics on an address that is no URL, and does not say what it has against plain HTTP.
    let endpoint = settings.get(&AmazonS3ConfigKey::S3Endpoint).or_else(|| settings.get(&AmazonS3ConfigKey::Endpoint));
    let Some((name, value)) = endpoint else { return Ok(builder) };
    if value.contains('@') {
        return Err(VariableError::User { name: name.clone() }.into());
    }
    match parse_endpoint(value) {
        None => Err(VariableError::Malformed { name: name.clone(), value: value.clone() }.into()),
        // A server on this machine has no certificate, and nobody else hears the plain text.
        Some(url) if is_loopback(&url) => Ok(builder.with_allow_http(true)),
        Some(url) if url.scheme() == "http" && !settings.get(&ALLOW_HTTP).is_some_and(|(_, value)| is_true(value)) => {
            Err(VariableError::PlainHttp { name: name.clone(), value: value.clone() }.into())
        }
        Some(_) => Ok(builder),
    }
}

/// `None` also for what a browser would mend, such as spaces around: the client takes the text as it is.
fn parse_endpoint(value: &str) -> Option<Url> {
    let host = value.strip_prefix("http://").or_else(|| value.strip_prefix("https://"))?;
    let begins = host.starts_with(|first: char| first.is_ascii_alphanumeric() || first == '[');
    let is_plain = begins && host.bytes().all(|byte| byte.is_ascii_graphic());
    Url::parse(value).ok().filter(|_| is_plain)
}

fn is_loopback(endpoint: &Url) -> bool {
    match endpoint.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

/// As the client reads it.
fn is_true(value: &str) -> bool {
    matches!(value.to_ascii_lowercase().as_str(), "1" | "true" | "on" | "yes" | "y")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(variables: &[(&str, &str)]) -> Result<(AmazonS3, Key), ArtifactError> {
        let keys = [("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")];
        let variables = keys.iter().chain(variables).map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        client("models", "team-a", variables)
    }

    fn refusal(variables: &[(&str, &str)]) -> String {
        match opened(variables) {
            Err(error @ ArtifactError::Remote { .. }) => error.to_string(),
            other => panic!("{variables:?}: {other:?}"),
        }
    }

    #[test]
    fn variables_that_are_empty_are_none_and_ends_of_lines_are_named_without_what_is_before_them() {
        let empty =
            ["AWS_SESSION_TOKEN", "AWS_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"].map(|name| (name, ""));
        opened(&empty).unwrap();
        for name in ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION"] {
            for value in ["hidden\n", " hidden", "hid\u{7f}den"] {
                let told = refusal(&[(name, value)]);
                assert!(told.contains(&format!("{name} has a blank or the end of a line")), "{told}");
                assert!(!told.contains("hid"), "{told}");
            }
        }
        let told = refusal(&[("AWS_ENDPOINT_URL", "http://user:hidden@minio:9000")]);
        assert!(told.contains("AWS_ENDPOINT_URL has a user in it") && !told.contains("hidden"), "{told}");
    }

    #[test]
    fn an_endpoint_that_is_no_url_is_refused_with_what_to_write() {
        for bad in ["127.0.0.1:19000", "minio:9000", "http://", "http:///x", " http://a", "http://a\n", "ftp://a"] {
            let told = refusal(&[("AWS_ENDPOINT_URL", bad)]);
            let wanted = format!("AWS_ENDPOINT_URL is {bad:?}; write http://HOST:PORT or https://HOST:PORT");
            assert_eq!(told, format!("could not set up the S3 client for `s3://models/team-a`: {wanted}"));
        }
        for good in ["http://127.0.0.1:19000", "http://localhost:1/", "http://[::1]:1", "https://minio.example:9000/s3"]
        {
            opened(&[("AWS_ENDPOINT_URL", good)]).unwrap();
        }
    }

    #[test]
    fn plain_http_to_another_machine_needs_a_word() {
        let plain = ("AWS_ENDPOINT_URL", "http://minio:9000");
        for variables in [&[plain][..], &[plain, ("AWS_ALLOW_HTTP", "false")]] {
            let told = refusal(variables);
            assert!(told.contains("AWS_ENDPOINT_URL is \"http://minio:9000\"") && told.contains("AWS_ALLOW_HTTP=true"));
        }
        opened(&[plain, ("AWS_ALLOW_HTTP", "true")]).unwrap();
        // The endpoint of S3 alone goes before that of all services, whatever that is.
        opened(&[plain, ("AWS_ENDPOINT_URL_S3", "https://minio:9000")]).unwrap();
    }

    #[test]
    fn silence_has_a_limit_and_a_whole_answer_has_none_unless_somebody_sets_one() {
        let limits = |variables: &[(&str, &str)]| {
            let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
            let builder = builder(variables).unwrap();
            [ClientConfigKey::Timeout, ClientConfigKey::ReadTimeout]
                .map(|limit| builder.get_config_value(&AmazonS3ConfigKey::Client(limit)))
        };
        assert_eq!(limits(&[]), [None, Some("30s".to_owned())]);
        assert_eq!(limits(&[("AWS_TIMEOUT", "9s")]), [Some("9s".to_owned()), Some("30s".to_owned())]);
    }

    #[test]
    fn a_prefix_is_taken_as_it_is_and_one_with_a_control_character_is_refused() {
        for prefix in ["", "~prod", "100%", "a/b/c d/e+ü"] {
            assert_eq!(client("models", prefix, std::iter::empty()).unwrap().1.as_ref(), prefix);
        }
        let error = client("models", "a\nb", std::iter::empty()).unwrap_err();
        assert!(matches!(error, ArtifactError::InvalidUri { .. }), "{error}");
    }
}
