//! The trainer: an explicit block executor, data-parallel training, checkpoints, evaluation.
