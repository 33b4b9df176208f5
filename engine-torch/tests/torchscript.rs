//! TorchScript through the engine trait: right numbers, names as Triton has them, and refusals that say what is missing.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::float_cmp, reason = "small whole numbers, which floats hold exactly")]

use std::num::NonZeroUsize;
use std::path::PathBuf;

use bytes::Bytes;
use sensorium_engine::{
    DType, Declared, DeclaredTensor, Device, Engine, EngineError, Options, RESET_METHOD, RawTensor,
};
use sensorium_engine_torch::{Attribute, OPENER, TorchScript, compile, thread_count};
use tempfile::TempDir;

/// A compiled source.
struct File {
    path: PathBuf,
    _folder: TempDir,
}

fn file(source: &str, attributes: &[(&str, Attribute<'_>)]) -> File {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.pt");
    compile(source, attributes, &path).unwrap();
    File { path, _folder: folder }
}

fn tensor(name: &str, dtype: DType, shape: &[i64]) -> DeclaredTensor {
    let shape = shape.iter().map(|&size| u64::try_from(size).ok()).collect();
    DeclaredTensor { name: name.to_owned(), dtype: Some(dtype), shape: Some(shape) }
}

fn declared(inputs: &[DeclaredTensor], outputs: &[DeclaredTensor]) -> Declared {
    Declared { inputs: inputs.to_vec(), outputs: outputs.to_vec(), ..Declared::default() }
}

fn f32s(shape: &[i64], values: &[f32]) -> RawTensor {
    RawTensor::from_vec(DType::Fp32, shape.to_vec(), values.to_vec()).unwrap()
}

fn one() -> Declared {
    declared(&[tensor("INPUT__0", DType::Fp32, &[-1])], &[tensor("OUTPUT__0", DType::Fp32, &[-1])])
}

fn open(file: &File, declared: &Declared) -> Result<TorchScript, EngineError> {
    TorchScript::open(&file.path, Options::default(), declared)
}

fn numbers(found: &[RawTensor]) -> Vec<f32> {
    found.iter().flat_map(|tensor| tensor.numbers::<f32>().into_owned()).collect()
}

#[test]
fn inputs_go_by_number_or_by_the_names_of_arguments() {
    let file = file("def forward(self, a, b):\n    return a - b\n", &[]);
    let x = [f32s(&[2], &[5.0, 7.0]), f32s(&[2], &[1.0, 2.0])];
    let output = [tensor("OUTPUT__0", DType::Fp32, &[-1])];
    for (first, second, expected) in [
        ("INPUT__0", "INPUT__1", [4.0, 5.0]),
        ("a", "b", [4.0, 5.0]),
        ("b", "a", [-4.0, -5.0]),
        ("x__1", "x__0", [-4.0, -5.0]),
    ] {
        let inputs = [tensor(first, DType::Fp32, &[-1]), tensor(second, DType::Fp32, &[-1])];
        let mut engine = open(&file, &declared(&inputs, &output)).unwrap();
        assert_eq!(numbers(&engine.run_raw(&x, &[0]).unwrap()), expected, "{first} {second}");
    }
}

#[test]
fn tuples_lists_and_dicts_are_outputs_by_number_or_key() {
    let outputs = |first: &str, second: &str| {
        let names = [tensor(first, DType::Fp32, &[-1]), tensor(second, DType::Fp32, &[-1])];
        declared(&[tensor("x", DType::Fp32, &[-1])], &names)
    };
    for (source, first, second) in [
        ("def forward(self, x):\n    return x + 1, x * 2\n", "OUTPUT__0", "OUTPUT__1"),
        ("def forward(self, x):\n    return [x + 1, x * 2]\n", "OUTPUT__0", "OUTPUT__1"),
        ("def forward(self, x):\n    return {'sum': x + 1, 'product': x * 2}\n", "sum", "product"),
    ] {
        let file = file(source, &[]);
        let mut engine = open(&file, &outputs(first, second)).unwrap();
        let x = [f32s(&[1], &[5.0])];
        assert_eq!(numbers(&engine.run_raw(&x, &[0, 1]).unwrap()), [6.0, 10.0], "{source}");
        assert_eq!(numbers(&engine.run_raw(&x, &[1]).unwrap()), [10.0], "{source}");
        assert_eq!(numbers(&engine.run_raw(&x, &[1, 0]).unwrap()), [10.0, 6.0], "{source}");
    }
}

#[test]
fn numbers_booleans_and_texts_are_arguments_too() {
    let source = "def forward(self, x, n: int, f: float, b: bool, t: List[str], o: Optional[Tensor], d: int = 7):
    r = x * n + f
    if b:
        r = -r
    if o is not None:
        r = r + o
    return r + d, [t[1], t[0]]
";
    let file = file(source, &[]);
    let inputs = [
        tensor("x", DType::Fp32, &[-1]),
        tensor("n", DType::Int64, &[1]),
        tensor("f", DType::Fp32, &[1]),
        tensor("b", DType::Bool, &[1]),
        tensor("t", DType::Bytes, &[-1]),
    ];
    let outputs = [tensor("OUTPUT__0", DType::Fp32, &[-1]), tensor("OUTPUT__1", DType::Bytes, &[-1])];
    let mut engine = open(&file, &declared(&inputs, &outputs)).unwrap();
    let values = [
        f32s(&[1], &[2.0]),
        RawTensor::from_vec(DType::Int64, vec![1], vec![3_i64]).unwrap(),
        f32s(&[1], &[0.5]),
        RawTensor::new(DType::Bool, vec![1], Bytes::from_static(&[1])).unwrap(),
        RawTensor::from_strings(vec![2], &["one", "é"]).unwrap(),
    ];
    let found = engine.run_raw(&values, &[0, 1]).unwrap();
    assert_eq!(numbers(&found[..1]), [0.5], "-(2 * 3 + 0.5) + 7");
    assert_eq!(found[1].strings().collect::<Vec<_>>(), ["é".as_bytes(), b"one"]);
}

#[test]
fn what_the_file_says_is_read_and_what_it_does_not_is_asked_for() {
    let scalars = file("def forward(self, n: int, b: bool):\n    return torch.full([n], 1.5), torch.tensor(b)\n", &[]);
    let error = open(&scalars, &Declared::default()).unwrap_err().to_string();
    assert!(
        error.contains("does not say of which type and shape output `OUTPUT__0` is; write it in config.pbtxt"),
        "{error}"
    );
    let outputs = [tensor("OUTPUT__0", DType::Fp32, &[-1]), tensor("OUTPUT__1", DType::Bool, &[])];
    let mut engine = open(&scalars, &declared(&[], &outputs)).unwrap();
    let inputs: Vec<_> = engine.signature().inputs().iter().map(|spec| (spec.name.clone(), spec.dtype)).collect();
    assert_eq!(inputs, [("n".to_owned(), DType::Int64), ("b".to_owned(), DType::Bool)]);
    let values = [
        RawTensor::from_vec(DType::Int64, vec![1], vec![2_i64]).unwrap(),
        RawTensor::new(DType::Bool, vec![1], Bytes::from_static(&[1])).unwrap(),
    ];
    let found = engine.run_raw(&values, &[0, 1]).unwrap();
    assert_eq!((numbers(&found[..1]), found[1].shape(), found[1].data().as_ref()), (vec![1.5, 1.5], &[][..], &[1][..]));

    let plain = file("def forward(self, x, y):\n    return x\n", &[]);
    let of = |inputs: &[&str], outputs: &[&str]| {
        let tensors = |names: &[&str]| names.iter().map(|name| tensor(name, DType::Fp32, &[-1])).collect::<Vec<_>>();
        open(&plain, &declared(&tensors(inputs), &tensors(outputs))).unwrap_err().to_string()
    };
    let cases = [
        (open(&plain, &Declared::default()).unwrap_err().to_string(), "of which type and shape input `x` is"),
        (of(&["z", "x"], &["OUTPUT__0"]), "has input `z`, but `forward` takes x, y"),
        (of(&["INPUT__2"], &["OUTPUT__0"]), "has input `INPUT__2`, but `forward` takes x, y"),
        (of(&["x"], &["OUTPUT__0"]), "takes `y`, a Tensor, which its configuration leaves out"),
        (of(&["x", "INPUT__0"], &["OUTPUT__0"]), "`x` and `INPUT__0` are both argument `x`"),
        (of(&["x", "y"], &["OUTPUT__0", "out"]), "output `out` has no number"),
        (of(&["a", "b", "c"], &["OUTPUT__0"]), "has input `a`, but `forward` takes x, y"),
        (of(&["x", "y"], &["OUTPUT__1"]), "has output `OUTPUT__1`, but `forward` returns 1"),
        (of(&["x", "y"], &["OUTPUT__0", "a__0"]), "are the same one of `forward`"),
    ];
    for (error, expected) in cases {
        assert!(error.contains(expected), "{error} has not {expected}");
    }
    let dict = file("def forward(self, x):\n    return {'a': x}\n", &[]);
    let error = open(&dict, &declared(&[tensor("x", DType::Fp32, &[-1])], &[])).unwrap_err().to_string();
    assert!(error.contains("returns a dict, and its file does not say which outputs"), "{error}");
    let number = file("def forward(self, x):\n    return x.size(0)\n", &[]);
    let error = open(&number, &one()).unwrap_err().to_string();
    assert!(error.contains("returns int, which is no tensor"), "{error}");
}

#[test]
fn names_that_mean_nothing_to_the_file_stand_in_its_order() {
    let file = file("def forward(self, x, y):\n    return x + y, x - y\n", &[]);
    let tensors = |names: [&str; 2]| names.map(|name| tensor(name, DType::Fp32, &[-1]));
    let mut engine = open(&file, &declared(&tensors(["left", "right"]), &tensors(["SUM", "DIFFERENCE"]))).unwrap();
    let found = engine.run_raw(&[f32s(&[1], &[5.0]), f32s(&[1], &[3.0])], &[0, 1]).unwrap();
    assert_eq!((numbers(&found[..1]), numbers(&found[1..])), (vec![8.0], vec![2.0]));
}

#[test]
fn a_tensor_takes_no_texts() {
    let file = file("def forward(self, x):\n    return x\n", &[]);
    let error = open(&file, &declared(&[tensor("x", DType::Bytes, &[-1])], &[])).unwrap_err().to_string();
    assert!(error.contains("its input `x` is argument `x`, a Tensor, which has no texts"), "{error}");
}

#[test]
fn every_element_type_passes_through_unchanged() {
    pass_every_element_type_through(Options::default());
}

fn pass_every_element_type_through(options: Options) {
    let file = file("def forward(self, x):\n    return x\n", &[]);
    let bytes = Bytes::from_static(&[9, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1, 1, 0, 0, 0, 1, 0]);
    for (dtype, size) in [
        (DType::Bool, 1),
        (DType::Uint8, 1),
        (DType::Uint16, 2),
        (DType::Uint32, 4),
        (DType::Uint64, 8),
        (DType::Int8, 1),
        (DType::Int16, 2),
        (DType::Int32, 4),
        (DType::Int64, 8),
        (DType::Fp16, 2),
        (DType::Bf16, 2),
        (DType::Fp32, 4),
        (DType::Fp64, 8),
    ] {
        let declared = declared(&[tensor("x", dtype, &[-1, 1])], &[tensor("OUTPUT__0", dtype, &[-1, 1])]);
        let mut engine = TorchScript::open(&file.path, options, &declared).unwrap();
        // Also from an odd address.
        let x = RawTensor::new(dtype, vec![16 / size, 1], bytes.slice(1..)).unwrap();
        assert_eq!(engine.run_raw(std::slice::from_ref(&x), &[0]).unwrap(), [x], "{dtype:?}");
        let empty = RawTensor::zeros(dtype, vec![0, 1]).unwrap();
        assert_eq!(engine.run_raw(std::slice::from_ref(&empty), &[0]).unwrap(), [empty], "{dtype:?}");
    }
}

#[test]
fn an_error_of_the_model_is_a_sentence_and_the_engine_works_on() {
    let source = "def forward(self, x):\n    assert x.size(0) != 3, 'three is too many'\n    return torch.mm(x, x)\n";
    let file = file(source, &[]);
    let declared = declared(&[tensor("x", DType::Fp32, &[-1, -1])], &[tensor("OUTPUT__0", DType::Fp32, &[-1, -1])]);
    let mut engine = open(&file, &declared).unwrap();
    for _ in 0..3 {
        let error = engine.run_raw(&[f32s(&[1, 2], &[1.0; 2])], &[0]).unwrap_err();
        let expected = "the graph failed while running: mat1 and mat2 shapes cannot be multiplied (1x2 and 1x2)";
        assert_eq!(error.to_string(), expected);
        let error = engine.run_raw(&[f32s(&[3, 1], &[1.0; 3])], &[0]).unwrap_err().to_string();
        assert!(error.ends_with("three is too many") && !error.contains('\n'), "{error}");
        assert_eq!(numbers(&engine.run_raw(&[f32s(&[1, 1], &[3.0])], &[0]).unwrap()), [9.0]);
    }
}

#[test]
fn what_is_not_as_declared_is_an_error_that_says_how_it_is() {
    let file = file("def forward(self, x):\n    return x.double()\n", &[]);
    let mut engine = open(&file, &one()).unwrap();
    let error = engine.run_raw(&[f32s(&[1], &[1.0])], &[0]).unwrap_err().to_string();
    assert!(error.ends_with("it gave output `OUTPUT__0` as FP64, its configuration says FP32"), "{error}");
    let narrow = declared(&[tensor("INPUT__0", DType::Fp32, &[-1])], &[tensor("OUTPUT__0", DType::Fp64, &[2])]);
    let error = open(&file, &narrow).unwrap().run_raw(&[f32s(&[1], &[1.0])], &[0]).unwrap_err().to_string();
    assert!(error.ends_with("it gave output `OUTPUT__0` with shape [1], its configuration says [2]"), "{error}");
}

#[test]
fn what_is_no_tensor_or_none_that_can_be_read_is_an_error_that_says_so() {
    let run = |source: &str| {
        let file = file(source, &[]);
        open(&file, &one()).unwrap().run_raw(&[f32s(&[2], &[1.0, 0.0])], &[0]).unwrap_err().to_string()
    };
    let sparse = run("def forward(self, x):\n    return x.to_sparse()\n");
    assert!(sparse.contains("is sparse") && sparse.contains(".to_dense()"), "{sparse}");
    let none = run(
        "def forward(self, x) -> Tuple[Optional[Tensor], Tensor]:\n    y: Optional[Tensor] = None\n    return y, x\n",
    );
    assert!(none.contains("output 0 is None"), "{none}");
    let empty = open(&file("def forward(self, x):\n    return ()\n", &[]), &Declared { outputs: Vec::new(), ..one() });
    let empty = empty.unwrap_err().to_string();
    assert!(empty.contains("empty tuple"), "{empty}");
    let beyond = declared(&[tensor("x", DType::Fp32, &[-1])], &[tensor("OUTPUT__256", DType::Fp32, &[-1])]);
    let beyond = open(&file("def forward(self, x):\n    return [x]\n", &[]), &beyond).unwrap_err().to_string();
    assert!(beyond.contains("the first 256"), "{beyond}");
}

#[test]
fn a_file_that_is_no_module_is_named() {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in [("garbage.pt", &b"not a module"[..]), ("empty.pt", b"")] {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let error = (OPENER.open)(&path, Options::default(), &one()).err().unwrap();
        assert!(matches!(error, EngineError::Open { .. }), "{error:?}");
        assert!(error.to_string().contains(name) && !error.to_string().contains('\n'), "{error}");
    }
    let error = compile("def forward(self, x):\n    return y\n", &[], &folder.path().join("a.pt")).unwrap_err();
    assert!(error.to_string().contains("undefined value y"), "{error}");
}

/// A module that keeps `total`, and hands out the very tensor that it keeps.
const KEEPER: &str = "
def forward(self, x):
    self.total.add_(x)
    x.zero_()
    return self.total

def reset(self):
    self.total.zero_()
";

#[test]
fn what_a_module_keeps_or_overwrites_is_nobody_elses() {
    let file = file(KEEPER, &[("total", Attribute::Tensor(f32s(&[2], &[0.0; 2])))]);
    let declared = Declared { parameters: [(RESET_METHOD.to_owned(), "reset".to_owned())].into(), ..one() };
    let mut engine = open(&file, &declared).unwrap();
    let x = f32s(&[2], &[1.0, 2.0]);
    let first = engine.run_raw(std::slice::from_ref(&x), &[0]).unwrap();
    let second = engine.run_raw(std::slice::from_ref(&x), &[0]).unwrap();
    assert_eq!(numbers(std::slice::from_ref(&x)), [1.0, 2.0], "the caller's bytes are as they were");
    assert_eq!((numbers(&first), numbers(&second)), (vec![1.0, 2.0], vec![2.0, 4.0]));
    engine.reset().unwrap();
    assert_eq!(numbers(&engine.run_raw(&[x], &[0]).unwrap()), [1.0, 2.0]);
    let wrong = Declared { parameters: [(RESET_METHOD.to_owned(), "forget".to_owned())].into(), ..one() };
    let error = open(&file, &wrong).unwrap_err().to_string();
    assert!(error.contains("names `forget`, and the file has no method of that name"), "{error}");
}

#[test]
fn each_engine_has_its_own_number_of_threads() {
    let file = file("def forward(self, x):\n    return torch.mm(x, x)\n", &[]);
    let declared = declared(&[tensor("x", DType::Fp32, &[-1, -1])], &[tensor("OUTPUT__0", DType::Fp32, &[-1, -1])]);
    std::thread::scope(|scope| {
        for threads in [1, 2, 3, 1, 2] {
            let options = Options { threads: NonZeroUsize::new(threads).unwrap(), ..Options::default() };
            // Opened here, run there, as the server does.
            let mut engine = TorchScript::open(&file.path, options, &declared).unwrap();
            scope.spawn(move || {
                let x = f32s(&[64, 64], &[0.5; 64 * 64]);
                for _ in 0..50 {
                    let found = engine.run_raw(std::slice::from_ref(&x), &[0]).unwrap();
                    assert!(numbers(&found).iter().all(|number| *number == 16.0));
                    assert_eq!(thread_count(), threads);
                }
            });
        }
    });
}

#[test]
fn a_gpu_that_is_not_there_is_an_error_that_says_what_to_do_and_the_processor_goes_on() {
    let file = file("def forward(self, x):\n    return x\n", &[]);
    for device in [Device::Cuda(77), Device::TensorRt(77)] {
        let error = TorchScript::open(&file.path, Options { device, ..Options::default() }, &one()).unwrap_err();
        assert!(matches!(error, EngineError::Setup { .. }), "{error:?}");
        assert!(error.to_string().contains("KIND_CPU"), "{error}");
    }
    let mut engine = open(&file, &one()).unwrap();
    assert_eq!(numbers(&engine.run_raw(&[f32s(&[1], &[3.0])], &[0]).unwrap()), [3.0]);
}

#[test]
fn modules_of_other_files_can_be_wrapped() {
    let inner = file("def forward(self, x):\n    return x * 2\n", &[]);
    let source = "def forward(self, x, state):\n    y = self.inner.forward(x) + state\n    return y, y\n";
    let outer = file(source, &[("inner", Attribute::Module(&inner.path))]);
    let declared = declared(
        &[tensor("x", DType::Fp32, &[-1]), tensor("state", DType::Fp32, &[-1])],
        &[tensor("y__0", DType::Fp32, &[-1]), tensor("state__1", DType::Fp32, &[-1])],
    );
    let mut engine = open(&outer, &declared).unwrap();
    let found = engine.run_raw(&[f32s(&[1], &[3.0]), f32s(&[1], &[1.0])], &[0, 1]).unwrap();
    assert_eq!(numbers(&found), [7.0, 7.0]);
}

/// What needs a GPU: `make test-gpu`, on a machine that has one.
mod gpu {
    use super::*;

    fn on_gpu() -> Options {
        Options { device: Device::Cuda(0), ..Options::default() }
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn a_module_gives_there_what_it_gives_on_the_processor() {
        let weights: Vec<f32> = (0..64 * 64).map(|index| (index % 13) as f32 / 16.0 - 0.375).collect();
        let source = "def forward(self, x, count: int):\n    y = torch.relu(torch.matmul(x, self.w))\n    return y * count, y.sum(1)\n";
        let file = file(source, &[("w", Attribute::Tensor(f32s(&[64, 64], &weights)))]);
        let declared = declared(
            &[tensor("x", DType::Fp32, &[-1, 64]), tensor("count", DType::Int64, &[1])],
            &[tensor("y__0", DType::Fp32, &[-1, 64]), tensor("sum__1", DType::Fp32, &[-1])],
        );
        // The processor first: what libtorch finds out about GPUs in a run there it remembers.
        let mut there = open(&file, &declared).unwrap();
        there
            .run_raw(&[f32s(&[1, 64], &[0.0; 64]), RawTensor::zeros(DType::Int64, vec![1]).unwrap()], &[0, 1])
            .unwrap();
        let mut here = TorchScript::open(&file.path, on_gpu(), &declared).unwrap();
        for rows in [1, 3, 32, 3] {
            let x: Vec<f32> = (0..rows * 64).map(|index| (index % 7) as f32 / 8.0).collect();
            let count = RawTensor::from_vec(DType::Int64, vec![1], vec![2_i64]).unwrap();
            let inputs = [f32s(&[i64::from(rows), 64], &x), count];
            let [wanted, found] = [&mut there, &mut here].map(|engine| engine.run_raw(&inputs, &[0, 1]).unwrap());
            for (wanted, found) in wanted.iter().zip(&found) {
                assert_eq!(wanted.shape(), found.shape());
                for (wanted, found) in wanted.numbers::<f32>().iter().zip(found.numbers::<f32>().iter()) {
                    assert!((wanted - found).abs() <= 1e-3 * wanted.abs().max(1.0), "{wanted} {found}");
                }
            }
        }
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn every_element_type_passes_through_there_too() {
        pass_every_element_type_through(on_gpu());
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn an_error_of_the_model_is_its_own_and_memory_that_does_not_suffice_passes() {
        let file = file(
            "def forward(self, x, n: int):\n    return torch.zeros([n, 1024, 1024, 1024], device=x.device).sum() + x\n",
            &[],
        );
        let declared = declared(
            &[tensor("x", DType::Fp32, &[-1]), tensor("n", DType::Int64, &[1])],
            &[tensor("y__0", DType::Fp32, &[-1])],
        );
        let mut engine = TorchScript::open(&file.path, on_gpu(), &declared).unwrap();
        let inputs = |n: i64| [f32s(&[1], &[3.0]), RawTensor::from_vec(DType::Int64, vec![1], vec![n]).unwrap()];
        let error = engine.run_raw(&inputs(1000), &[0]).unwrap_err();
        assert!(matches!(&error, EngineError::Run { reason } if reason.contains("out of memory")), "{error:?}");
        assert_eq!(numbers(&engine.run_raw(&inputs(1), &[0]).unwrap()), [3.0]);
    }

    #[test]
    #[ignore = "needs a GPU, and to be the last one in its process"]
    fn an_assertion_on_the_gpu_loses_it() {
        let file = file(
            "def forward(self, x):\n    return torch.index_select(self.w, 0, x)\n",
            &[("w", Attribute::Tensor(f32s(&[4], &[1.0, 2.0, 3.0, 4.0])))],
        );
        let declared = declared(&[tensor("x", DType::Int64, &[-1])], &[tensor("y__0", DType::Fp32, &[-1])]);
        let mut engine = TorchScript::open(&file.path, on_gpu(), &declared).unwrap();
        let mut at =
            |index: i64| engine.run_raw(&[RawTensor::from_vec(DType::Int64, vec![1], vec![index]).unwrap()], &[0]);
        assert_eq!(numbers(&at(2).unwrap()), [3.0]);
        for index in [77, 2] {
            let error = at(index).unwrap_err();
            assert!(matches!(&error, EngineError::DeviceLost { reason } if reason.contains("assert")), "{error:?}");
        }
    }
}
