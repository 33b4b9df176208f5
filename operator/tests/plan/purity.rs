//! A plan depends on its resource alone. The crate's dependencies cannot show that for the standard library, and will
//! not once the crate has a client for other modules; this test reads the source.

use std::path::Path;

/// Words that bring in a client, a clock, randomness, the environment, files, threads or an async runtime.
const FORBIDDEN: [&str; 20] = [
    "async ",
    ".await",
    "tokio",
    "futures",
    "kube::",
    "Client",
    "std::time",
    "Instant",
    "SystemTime",
    "chrono",
    "jiff",
    "rand::",
    "uuid",
    "HashMap",
    "HashSet",
    "std::env",
    "std::fs",
    "std::net",
    "std::process",
    "std::thread",
];

#[test]
fn the_plan_names_no_client_clock_randomness_or_runtime() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/plan");
    let mut files = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        assert_eq!(path.extension().and_then(|extension| extension.to_str()), Some("rs"), "{}", path.display());
        let text = std::fs::read_to_string(&path).unwrap();
        for (i, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            for word in FORBIDDEN {
                assert!(
                    !code.contains(word),
                    "{}:{}: {word} makes a plan depend on more than its resource",
                    path.display(),
                    i + 1
                );
            }
        }
        files += 1;
    }
    assert!(files > 5, "the plan's source is elsewhere");
}
