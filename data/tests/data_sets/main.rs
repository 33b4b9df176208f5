//! The public behaviour of data sets. One program with a module per feature.

mod common;
mod easy_vqa;
mod reading;
mod sampling;
mod writing;
