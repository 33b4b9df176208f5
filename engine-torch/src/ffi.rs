//! All `unsafe` of this crate: the C functions of `cpp/shim.h`, and handles that make them safe to call.
//!
//! Ownership: each handle owns one C++ object and frees it once, on drop. An output's memory is its handle's alone: the
//! shim copies what the module keeps.
//! Threads: a [`Module`] may move between threads and is called by one at a time (`&mut`). An [`Output`] is never written
//! to again, so any thread may read and free it.

use std::ffi::{CStr, CString, c_char, c_int};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::ptr::{self, NonNull};

use bytes::Bytes;
use sensorium_engine::{DType, RawTensor};

/// Defines an opaque C++ type.
macro_rules! opaque {
    ($($name:ident),*) => { $(#[repr(C)] struct $name { _private: [u8; 0] })* };
}
opaque!(SensoriumModule, SensoriumTensor);

const OK: c_int = 0;
const LOST: c_int = 2;

#[repr(C)]
struct SensoriumArgument {
    kind: i32,
    may_lack: i32,
    name: *const c_char,
    declared: *const c_char,
}

#[repr(C)]
struct SensoriumResult {
    kind: i32,
    count: usize,
    declared: *const c_char,
}

#[repr(C)]
struct SensoriumView {
    is_there: i32,
    dtype: i32,
    data: *const u8,
    bytes: usize,
    sizes: *const i64,
    dims: usize,
    name: *const c_char,
}

#[repr(C)]
struct SensoriumAttribute {
    name: *const c_char,
    tensor: SensoriumView,
    module: *const c_char,
}

unsafe extern "C" {
    fn sensorium_torch_last_error() -> *const c_char;
    fn sensorium_torch_need_gpu(index: c_int) -> c_int;
    fn sensorium_torch_load(path: *const c_char, gpu: c_int, out: *mut *mut SensoriumModule) -> c_int;
    fn sensorium_torch_free(module: *mut SensoriumModule);
    fn sensorium_torch_argument_count(module: *const SensoriumModule) -> usize;
    fn sensorium_torch_argument(module: *const SensoriumModule, index: usize, out: *mut SensoriumArgument);
    fn sensorium_torch_result(module: *const SensoriumModule, out: *mut SensoriumResult);
    fn sensorium_torch_result_field(module: *const SensoriumModule, index: usize) -> *const c_char;
    fn sensorium_torch_has_method(module: *const SensoriumModule, method: *const c_char) -> c_int;
    fn sensorium_torch_run(
        module: *mut SensoriumModule,
        inputs: *const SensoriumView,
        count: usize,
        threads: c_int,
        optimize: c_int,
        tensors: *mut *mut SensoriumTensor,
        capacity: usize,
        found: *mut usize,
    ) -> c_int;
    fn sensorium_torch_call(
        module: *mut SensoriumModule,
        method: *const c_char,
        threads: c_int,
        optimize: c_int,
    ) -> c_int;
    fn sensorium_torch_view(tensor: *const SensoriumTensor, out: *mut SensoriumView);
    fn sensorium_torch_tensor_free(tensor: *mut SensoriumTensor);
    fn sensorium_torch_threads() -> c_int;
    fn sensorium_torch_compile(
        source: *const c_char,
        attributes: *const SensoriumAttribute,
        count: usize,
        path: *const c_char,
    ) -> c_int;
}

/// What libtorch said when it failed.
pub(crate) type Result<T> = std::result::Result<T, String>;

/// Turns a status into a result.
fn check(status: c_int) -> Result<()> {
    if status == OK {
        return Ok(());
    }
    Err(last_error())
}

fn last_error() -> String {
    // SAFETY: the shim hands out a buffer of this thread that ends with a zero, and nothing here calls it meanwhile.
    let text = unsafe { CStr::from_ptr(sensorium_torch_last_error()) };
    text.to_string_lossy().into_owned()
}

/// How a module's code failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// What was said; another run may do better.
    Run(String),
    /// What was said of the GPU, which this process cannot use any more.
    DeviceLost(String),
}

impl From<String> for Failure {
    fn from(said: String) -> Self {
        Self::Run(said)
    }
}

fn check_run(status: c_int) -> std::result::Result<(), Failure> {
    match status {
        OK => Ok(()),
        LOST => Err(Failure::DeviceLost(last_error())),
        _ => Err(Failure::Run(last_error())),
    }
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| format!("{text:?} has a zero byte in it"))
}

fn c_path(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| format!("{} has a zero byte in it", path.display()))
}

/// A text of the shim; `None` for null.
///
/// # Safety
/// `text` is null, or ends with a zero and lives through the call.
unsafe fn text(text: *const c_char) -> Option<String> {
    // SAFETY: as the caller promises.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

/// What an argument of `forward` is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ArgumentKind {
    Tensor,
    Int,
    Float,
    Bool,
    /// A list of texts.
    Texts,
    /// What no tensor stands for.
    Other,
}

/// An argument of `forward`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Argument {
    pub(crate) name: String,
    pub(crate) kind: ArgumentKind,
    /// As TorchScript writes it.
    pub(crate) declared: String,
    /// Whether a call may leave it out.
    pub(crate) may_lack: bool,
}

/// What `forward` returns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Returned {
    /// As many as these, by the names of a named tuple's fields where it has them.
    Fixed(Vec<Option<String>>),
    /// A list: the run decides how many.
    List,
    /// A dict: by name.
    Dict,
    /// What no tensors stand for, as TorchScript writes it.
    Other(String),
}

/// Makes the GPU of this index usable, or says why it is not.
pub(crate) fn need_gpu(index: i32) -> Result<()> {
    // SAFETY: it takes a number, from any thread.
    check(unsafe { sensorium_torch_need_gpu(index) })
}

/// A loaded module.
#[derive(Debug)]
pub(crate) struct Module(NonNull<SensoriumModule>);

// SAFETY: a `torch::jit::Module` belongs to no thread; what is per thread (thread count, inference mode) is set in each
// call.
unsafe impl Send for Module {}

impl Module {
    /// On to the GPU of this index, which [`need_gpu`] has found usable, or on to the processor.
    pub(crate) fn load(path: &Path, gpu: Option<i32>) -> Result<Self> {
        let path = c_path(path)?;
        let mut out = ptr::null_mut();
        // SAFETY: `path` ends with a zero and lives through the call; `out` is written on success only.
        check(unsafe { sensorium_torch_load(path.as_ptr(), gpu.unwrap_or(-1), &raw mut out) })?;
        NonNull::new(out).map(Self).ok_or_else(|| "libtorch gave no module".to_owned())
    }

    pub(crate) fn arguments(&self) -> Vec<Argument> {
        // SAFETY: the handle is live.
        let count = unsafe { sensorium_torch_argument_count(self.0.as_ptr()) };
        let argument = |index| {
            let mut out = SensoriumArgument { kind: 0, may_lack: 0, name: ptr::null(), declared: ptr::null() };
            // SAFETY: the handle is live, `index` is below the count, and both texts live as long as the module.
            let (name, declared) = unsafe {
                sensorium_torch_argument(self.0.as_ptr(), index, &raw mut out);
                (text(out.name), text(out.declared))
            };
            Argument {
                name: name.unwrap_or_default(),
                kind: match out.kind {
                    0 => ArgumentKind::Tensor,
                    1 => ArgumentKind::Int,
                    2 => ArgumentKind::Float,
                    3 => ArgumentKind::Bool,
                    4 => ArgumentKind::Texts,
                    _ => ArgumentKind::Other,
                },
                declared: declared.unwrap_or_default(),
                may_lack: out.may_lack != 0,
            }
        };
        (0..count).map(argument).collect()
    }

    pub(crate) fn returned(&self) -> Returned {
        let mut out = SensoriumResult { kind: 0, count: 0, declared: ptr::null() };
        // SAFETY: the handle is live, and the text lives as long as the module.
        let declared = unsafe {
            sensorium_torch_result(self.0.as_ptr(), &raw mut out);
            text(out.declared)
        };
        // SAFETY: the handle is live; the shim checks the index, and the text lives as long as the module.
        let field = |index| unsafe { text(sensorium_torch_result_field(self.0.as_ptr(), index)) };
        match out.kind {
            0 => Returned::Fixed(vec![None]),
            1 => Returned::Fixed((0..out.count).map(field).collect()),
            2 => Returned::List,
            3 => Returned::Dict,
            _ => Returned::Other(declared.unwrap_or_default()),
        }
    }

    /// Whether there is such a method, and it takes nothing.
    pub(crate) fn has_method(&self, method: &str) -> bool {
        let Ok(method) = c_string(method) else { return false };
        // SAFETY: the handle is live, and `method` ends with a zero.
        unsafe { sensorium_torch_has_method(self.0.as_ptr(), method.as_ptr()) != 0 }
    }

    /// Runs `forward`: an input for each argument, `None` for what is left out. At most `capacity` outputs.
    pub(crate) fn run(
        &mut self,
        inputs: &[Option<&RawTensor>],
        threads: usize,
        optimize: bool,
        capacity: usize,
    ) -> std::result::Result<Vec<Output>, Failure> {
        let views: Vec<SensoriumView> = inputs.iter().map(|input| view(*input)).collect();
        let mut tensors = vec![ptr::null_mut(); capacity];
        let mut found = 0;
        // SAFETY: the handle is live and `&mut` keeps others out. The views point into `inputs`, which live through the
        // call, and the shim copies them. `tensors` has `capacity` places.
        check_run(unsafe {
            sensorium_torch_run(
                self.0.as_ptr(),
                views.as_ptr(),
                views.len(),
                threads as c_int,
                c_int::from(optimize),
                tensors.as_mut_ptr(),
                capacity,
                &raw mut found,
            )
        })?;
        Ok(tensors.into_iter().take(found).filter_map(NonNull::new).map(Output).collect())
    }

    /// Runs a method that takes nothing.
    pub(crate) fn call(&mut self, method: &str, threads: usize, optimize: bool) -> std::result::Result<(), Failure> {
        let method = c_string(method)?;
        // SAFETY: the handle is live, `&mut` keeps others out, and `method` ends with a zero.
        check_run(unsafe {
            sensorium_torch_call(self.0.as_ptr(), method.as_ptr(), threads as c_int, c_int::from(optimize))
        })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: the handle is live, and this is its end.
        unsafe { sensorium_torch_free(self.0.as_ptr()) }
    }
}

/// A tensor that a run gave.
#[derive(Debug)]
pub(crate) struct Output(NonNull<SensoriumTensor>);

// SAFETY: nobody writes to it, its memory is its own, and libtorch counts references atomically.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

impl Output {
    fn view(&self) -> SensoriumView {
        let mut out = view(None);
        // SAFETY: the handle is live.
        unsafe { sensorium_torch_view(self.0.as_ptr(), &raw mut out) };
        out
    }

    /// Its key in a dict.
    pub(crate) fn name(&self) -> Option<String> {
        // SAFETY: the text is the handle's, which is live.
        unsafe { text(self.view().name) }
    }

    /// As a tensor, which keeps this handle and copies nothing.
    pub(crate) fn into_tensor(self) -> Result<RawTensor> {
        let view = self.view();
        let dtype = DTYPES.get(view.dtype as usize).copied().unwrap_or(DType::Bytes);
        let shape = if view.dims == 0 {
            Vec::new()
        } else {
            // SAFETY: the shim points to `dims` sizes that live as long as the handle.
            unsafe { std::slice::from_raw_parts(view.sizes, view.dims) }.to_vec()
        };
        RawTensor::new(dtype, shape, Bytes::from_owner(self)).map_err(|error| error.to_string())
    }
}

impl AsRef<[u8]> for Output {
    fn as_ref(&self) -> &[u8] {
        let view = self.view();
        if view.bytes == 0 {
            return &[];
        }
        // SAFETY: the shim points to that many bytes, which live as long as the handle and which nobody writes to.
        unsafe { std::slice::from_raw_parts(view.data, view.bytes) }
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        // SAFETY: the handle is live, and this is its end.
        unsafe { sensorium_torch_tensor_free(self.0.as_ptr()) }
    }
}

/// In the order of `dtypes` in the shim; texts come after the last.
const DTYPES: [DType; 14] = [
    DType::Bool,
    DType::Uint8,
    DType::Uint16,
    DType::Uint32,
    DType::Uint64,
    DType::Int8,
    DType::Int16,
    DType::Int32,
    DType::Int64,
    DType::Fp16,
    DType::Bf16,
    DType::Fp32,
    DType::Fp64,
    DType::Bytes,
];

/// What the shim reads; it points into `tensor`.
fn view(tensor: Option<&RawTensor>) -> SensoriumView {
    let Some(tensor) = tensor else {
        return SensoriumView {
            is_there: 0,
            dtype: 0,
            data: ptr::null(),
            bytes: 0,
            sizes: ptr::null(),
            dims: 0,
            name: ptr::null(),
        };
    };
    // Every element type is in the table.
    let dtype = DTYPES.iter().position(|dtype| *dtype == tensor.dtype()).unwrap_or(DTYPES.len());
    SensoriumView {
        is_there: 1,
        dtype: dtype as i32,
        data: tensor.data().as_ptr(),
        bytes: tensor.data().len(),
        sizes: tensor.shape().as_ptr(),
        dims: tensor.shape().len(),
        name: ptr::null(),
    }
}

/// Threads that the operators of this thread use.
pub(crate) fn threads() -> usize {
    // SAFETY: it reads a setting of this thread.
    unsafe { sensorium_torch_threads() as usize }
}

/// What a compiled module has beside its code.
#[derive(Clone, Debug)]
pub enum Attribute<'a> {
    /// A tensor.
    Tensor(RawTensor),
    /// The module in a file.
    Module(&'a Path),
}

/// Writes TorchScript source, the methods of a module with these attributes, to a file.
pub(crate) fn compile(source: &str, attributes: &[(&str, Attribute<'_>)], path: &Path) -> Result<()> {
    let (source, path) = (c_string(source)?, c_path(path)?);
    let names = attributes.iter().map(|(name, _)| c_string(name)).collect::<Result<Vec<_>>>()?;
    let modules = attributes.iter().map(|(_, attribute)| match attribute {
        Attribute::Tensor(_) => Ok(None),
        Attribute::Module(path) => c_path(path).map(Some),
    });
    let modules = modules.collect::<Result<Vec<_>>>()?;
    let attribute = |((name, module), (_, attribute)): ((&CString, &Option<CString>), &(&str, Attribute<'_>))| {
        let tensor = match attribute {
            Attribute::Tensor(tensor) => view(Some(tensor)),
            Attribute::Module(_) => view(None),
        };
        SensoriumAttribute {
            name: name.as_ptr(),
            tensor,
            module: module.as_ref().map_or(ptr::null(), |module| module.as_ptr()),
        }
    };
    let attributes: Vec<_> = names.iter().zip(&modules).zip(attributes).map(attribute).collect();
    // SAFETY: all texts end with a zero and live through the call, as do the tensors, which the shim copies.
    check(unsafe { sensorium_torch_compile(source.as_ptr(), attributes.as_ptr(), attributes.len(), path.as_ptr()) })
}
