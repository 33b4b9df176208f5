//! How long to wait before trying again.

use std::time::Duration;

use sha2::{Digest, Sha256};

/// Wait after the first failure.
const FIRST: Duration = Duration::from_secs(5);
/// The longest wait.
const LONGEST: Duration = Duration::from_mins(5);

/// Doubles with each of `failures`, up to five minutes. Up to a quarter is added, by `who` waits: jobs that failed
/// together do not come back together.
pub fn delay(failures: u32, who: &str) -> Duration {
    let doubled = FIRST.saturating_mul(2_u32.saturating_pow(failures.saturating_sub(1))).min(LONGEST);
    jitter(doubled, &format!("{who}/{failures}"))
}

/// `wait` and up to a quarter more, by who it is.
pub fn jitter(wait: Duration, who: &str) -> Duration {
    wait + wait.mul_f64(f64::from(Sha256::digest(who.as_bytes())[0]) / 255.0 / 4.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_five_minutes_and_differ_between_jobs() {
        for (failures, base) in [(1, 5.0), (2, 10.0), (3, 20.0), (6, 160.0), (7, 300.0), (50, 300.0)] {
            let seconds = delay(failures, "a").as_secs_f64();
            assert!((base..=base * 1.25).contains(&seconds), "{failures} failures: {seconds} s");
        }
        assert_eq!(delay(u32::MAX, "a").as_secs() / 400, 0);
        assert_ne!(delay(4, "a"), delay(4, "b"));
    }
}
