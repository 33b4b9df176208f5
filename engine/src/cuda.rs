//! What a model's configuration says of how CUDA runs it, in the words of onnxruntime's CUDA provider.

use std::collections::BTreeMap;

use crate::opener::Declared;

/// Parameters of a configuration that Triton's backend has numbers for, and what the provider calls them.
const NUMBERED: [(&str, &[&str]); 2] = [
    ("cudnn_conv_algo_search", &["EXHAUSTIVE", "HEURISTIC", "DEFAULT"]),
    ("arena_extend_strategy", &["kNextPowerOfTwo", "kSameAsRequested"]),
];

/// Those that the provider reads as they are.
const PLAIN: [&str; 2] = ["gpu_mem_limit", "do_copy_in_default_stream"];

/// Options that are addresses in this process, or that want of its callers what these do not do.
const REFUSED: [&str; 7] = [
    "has_user_compute_stream",
    "user_compute_stream",
    "gpu_external_alloc",
    "gpu_external_free",
    "gpu_external_empty_cache",
    "default_memory_arena_cfg",
    "enable_cuda_graph",
];

/// Options of the provider, by name. What the accelerator `cuda` has goes as it is, and wins over the parameters of the model that
/// Triton had for it before.
///
/// # Errors
/// A number that stands for nothing, or an option that nobody may set, as a sentence about the model.
pub(crate) fn options(declared: &Declared) -> Result<BTreeMap<String, String>, String> {
    // Batches come in all sizes. To try every way of a convolution for each new one takes seconds, in the middle of serving.
    let mut options = BTreeMap::from([("cudnn_conv_algo_search".to_owned(), "HEURISTIC".to_owned())]);
    for (name, words) in NUMBERED {
        let Some(number) = declared.parameters.get(name) else { continue };
        let word = number.trim().parse::<usize>().ok().and_then(|number| words.get(number)).ok_or_else(|| {
            format!("its parameter {name} is {number:?}, it must be a number from 0 to {}", words.len() - 1)
        })?;
        options.insert(name.to_owned(), (*word).to_owned());
    }
    for name in PLAIN {
        options.extend(declared.parameters.get(name).map(|value| (name.to_owned(), value.clone())));
    }
    if let Some(name) = REFUSED.iter().find(|name| declared.cuda.contains_key(**name)) {
        return Err(format!("its accelerator cuda has {name}, which a program can set and a configuration cannot"));
    }
    options.extend(declared.cuda.clone());
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn found(parameters: &[(&str, &str)], cuda: &[(&str, &str)]) -> Result<BTreeMap<String, String>, String> {
        options(&Declared { parameters: strings(parameters), cuda: strings(cuda), ..Declared::default() })
    }

    #[test]
    fn parameters_are_put_into_the_providers_words_and_the_accelerators_win() {
        let search = ("cudnn_conv_algo_search", "HEURISTIC");
        assert_eq!(found(&[("intra_op_thread_count", "2")], &[]), Ok(strings(&[search])));
        let parameters = [("cudnn_conv_algo_search", "0"), ("arena_extend_strategy", "1"), ("gpu_mem_limit", "1000")];
        let exhaustive = ("cudnn_conv_algo_search", "EXHAUSTIVE");
        let same = ("arena_extend_strategy", "kSameAsRequested");
        assert_eq!(found(&parameters, &[]), Ok(strings(&[exhaustive, same, ("gpu_mem_limit", "1000")])));
        let cuda = [("cudnn_conv_algo_search", "DEFAULT"), ("use_tf32", "0")];
        assert_eq!(found(&parameters[..1], &cuda), Ok(strings(&cuda)));
        let error = found(&[("cudnn_conv_algo_search", "3")], &[]).unwrap_err();
        assert!(error.contains("cudnn_conv_algo_search") && error.contains("0 to 2"), "{error}");
        let error = found(&[], &[("user_compute_stream", "4096")]).unwrap_err();
        assert!(error.contains("user_compute_stream"), "{error}");
    }
}
