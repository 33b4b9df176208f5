//! Numbers and paths as people read them.

use std::path::{Path, PathBuf};

/// A span of time: `850ms`, `12.3s`, `4m10s`, `2h05m`.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0).round() as u64;
    match seconds {
        s if s < 1.0 => format!("{:.0}ms", s.max(0.0) * 1000.0),
        s if s < 59.95 => format!("{s:.1}s"),
        _ if whole < 3600 => format!("{}m{:02}s", whole / 60, whole % 60),
        _ => format!("{}h{:02}m", whole / 3600, whole % 3600 / 60),
    }
}

/// A size in bytes with a decimal prefix: `512 B`, `4.2 kB`, `1.3 MB`.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["kB", "MB", "GB", "TB"];
    if bytes < 1000 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1000.0;
    let mut unit = 0;
    while value >= 999.95 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// A measurement: whole numbers as such, others with four decimals.
pub fn number(value: f64) -> String {
    if value.fract() == 0.0 && value.abs() < 1e15 { format!("{value:.0}") } else { format!("{value:.4}") }
}

/// The path relative to the working directory where it is below it: what one would type.
pub fn shorten(path: &Path) -> PathBuf {
    let here = std::env::current_dir().unwrap_or_default();
    path.strip_prefix(here).unwrap_or(path).to_owned()
}

/// A single-precision number as the double with the same shortest decimal form: 0.99 stays 0.99 in JSON.
pub fn widen(value: f32) -> f64 {
    value.to_string().parse().unwrap_or_else(|_| f64::from(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_keep_the_digits_that_matter() {
        let cases =
            [(0.0, "0ms"), (0.85, "850ms"), (12.34, "12.3s"), (59.96, "1m00s"), (250.0, "4m10s"), (7500.0, "2h05m")];
        for (seconds, text) in cases {
            assert_eq!(duration(seconds), text);
        }
    }

    #[test]
    fn sizes_have_a_decimal_prefix() {
        for (bytes, text) in [(512, "512 B"), (4_200, "4.2 kB"), (999_990, "1.0 MB"), (1_300_000_000, "1.3 GB")] {
            assert_eq!(size(bytes), text);
        }
    }
}
