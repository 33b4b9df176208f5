//! Where the tensors of a run come from, and where they go. Alone in its process, whose memory is measured.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use sensorium_engine::{DType, Declared, DeclaredTensor, Engine as _, Options, RawTensor};
use sensorium_engine_torch::{TorchScript, compile};

/// Elements of each tensor: 48 MiB, more than glibc ever keeps of its own accord.
const ELEMENTS: usize = 12 << 20;
/// Those that a run makes, some of them at the same time.
const SOURCE: &str = "def forward(self, x):
    y = x.repeat(12 * 1024 * 1024)
    z = y + 1
    z = z * 2
    return z.mean().reshape(1)
";

/// Pages of this thread that the kernel had to find for it.
fn faults() -> u64 {
    let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    fields.split(' ').nth(7).unwrap().parse().unwrap()
}

/// Bytes that are resident.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

#[test]
fn what_a_run_leaves_is_what_the_next_one_takes_and_goes_with_the_module() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.pt");
    compile(SOURCE, &[], &path).unwrap();
    let tensor =
        |name: &str| DeclaredTensor { name: name.to_owned(), dtype: Some(DType::Fp32), shape: Some(vec![Some(1)]) };
    let declared = Declared { inputs: vec![tensor("x")], outputs: vec![tensor("OUTPUT__0")], ..Declared::default() };
    let mut engine = TorchScript::open(&path, Options::default(), &declared).unwrap();
    let x = RawTensor::from_vec(DType::Fp32, vec![1], vec![3.0_f32]).unwrap();
    let mut run = || {
        let found = engine.run_raw(std::slice::from_ref(&x), &[0]).unwrap();
        let found = found[0].numbers::<f32>()[0];
        assert!((found - 8.0).abs() < 0.1, "{found}");
    };
    // Until the graph is as it will be.
    for _ in 0..5 {
        run();
    }
    let before = faults();
    for _ in 0..4 {
        run();
    }
    let pages = (size_of::<f32>() * ELEMENTS / 4096) as u64;
    let found = faults() - before;
    assert!(found < pages, "{found} pages were new in four runs, where a tensor has {pages}");

    let kept = resident();
    drop(engine);
    let given_back = kept - resident();
    assert!(given_back >= 48 << 20, "{given_back} bytes were given back");
}
