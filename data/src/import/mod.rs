//! Importers: from what others publish to shards.

mod easy_vqa;

pub use easy_vqa::{Progress, SplitSummary, Summary, easy_vqa};
