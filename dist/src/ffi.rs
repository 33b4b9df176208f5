//! All `unsafe` of the workspace: the C functions of `cpp/shim.h` and handles that make them safe to call.
//!
//! Ownership: each handle owns one C++ object and frees it once, on drop. C++ keeps shares (`intrusive_ptr`) of what a
//! running operation needs, so no drop order can free memory under it.
//! Threads: [`RawStore`] is safe to share because `TCPStore` locks around every call. [`RawGroup`] is because it locks
//! around every start: `ProcessGroupGloo` numbers operations with a plain counter. [`RawWork`] may move between threads.

use std::ffi::{CStr, CString, c_char, c_int};
use std::os::fd::{IntoRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tch::Tensor;
use torch_sys::C_tensor;

/// Defines an opaque C++ type.
macro_rules! opaque {
    ($($name:ident),*) => { $(#[repr(C)] struct $name { _private: [u8; 0] })* };
}
opaque!(SensoriumStore, SensoriumGroup, SensoriumWork);

const OK: c_int = 0;
const PENDING: c_int = 2;

unsafe extern "C" {
    fn sensorium_last_error() -> *const c_char;
    fn sensorium_store_tcp(
        host: *const c_char,
        port: u16,
        listen_fd: c_int,
        timeout_ms: i64,
        out: *mut *mut SensoriumStore,
    ) -> c_int;
    fn sensorium_store_free(store: *mut SensoriumStore);
    fn sensorium_store_clone(store: *mut SensoriumStore, out: *mut *mut SensoriumStore) -> c_int;
    fn sensorium_store_set(store: *mut SensoriumStore, key: *const c_char, data: *const u8, length: usize) -> c_int;
    fn sensorium_store_get(
        store: *mut SensoriumStore,
        key: *const c_char,
        data: *mut *mut u8,
        length: *mut usize,
    ) -> c_int;
    fn sensorium_bytes_free(data: *mut u8);
    fn sensorium_store_wait(
        store: *mut SensoriumStore,
        keys: *const *const c_char,
        count: usize,
        timeout_ms: i64,
    ) -> c_int;
    fn sensorium_store_check(store: *mut SensoriumStore, key: *const c_char, out: *mut bool) -> c_int;
    fn sensorium_store_add(store: *mut SensoriumStore, key: *const c_char, amount: i64, out: *mut i64) -> c_int;
    fn sensorium_store_delete(store: *mut SensoriumStore, key: *const c_char, out: *mut bool) -> c_int;

    fn sensorium_group_gloo(
        store: *mut SensoriumStore,
        prefix: *const c_char,
        rank: c_int,
        size: c_int,
        interface: *const c_char,
        timeout_ms: i64,
        out: *mut *mut SensoriumGroup,
    ) -> c_int;
    fn sensorium_group_free(group: *mut SensoriumGroup);
    fn sensorium_all_reduce(
        group: *mut SensoriumGroup,
        tensor: *mut C_tensor,
        reduce: c_int,
        out: *mut *mut SensoriumWork,
    ) -> c_int;
    fn sensorium_broadcast(
        group: *mut SensoriumGroup,
        tensor: *mut C_tensor,
        root: c_int,
        out: *mut *mut SensoriumWork,
    ) -> c_int;
    fn sensorium_all_gather(
        group: *mut SensoriumGroup,
        output: *mut C_tensor,
        input: *mut C_tensor,
        out: *mut *mut SensoriumWork,
    ) -> c_int;
    fn sensorium_all_to_all(
        group: *mut SensoriumGroup,
        output: *mut C_tensor,
        input: *mut C_tensor,
        out: *mut *mut SensoriumWork,
    ) -> c_int;
    fn sensorium_send(
        group: *mut SensoriumGroup,
        tensor: *mut C_tensor,
        to: c_int,
        tag: c_int,
        out: *mut *mut SensoriumWork,
    ) -> c_int;
    fn sensorium_recv(
        group: *mut SensoriumGroup,
        tensor: *mut C_tensor,
        from: c_int,
        tag: c_int,
        out: *mut *mut SensoriumWork,
    ) -> c_int;
    fn sensorium_barrier(group: *mut SensoriumGroup, out: *mut *mut SensoriumWork) -> c_int;
    fn sensorium_work_wait(work: *mut SensoriumWork, slice_ms: i64) -> c_int;
    fn sensorium_work_free(work: *mut SensoriumWork);

    fn sensorium_keep_freed_memory();

    fn sensorium_backward(outputs: *const *mut C_tensor, gradients: *const *mut C_tensor, count: usize) -> c_int;
    fn sensorium_set_grad(leaf: *mut C_tensor, gradient: *mut C_tensor) -> c_int;
    fn sensorium_addcmul(tensor: *mut C_tensor, a: *mut C_tensor, b: *mut C_tensor, value: f64) -> c_int;
    fn sensorium_addcdiv(tensor: *mut C_tensor, a: *mut C_tensor, b: *mut C_tensor, value: f64) -> c_int;
}

/// What C++ said when it failed; the callers turn it into a [`crate::DistError`] that names the operation.
pub(crate) type Result<T> = std::result::Result<T, String>;

/// Turns a status into a result.
fn check(status: c_int) -> Result<()> {
    if status == OK { Ok(()) } else { Err(last_error()) }
}

fn last_error() -> String {
    // SAFETY: the shim returns a NUL-terminated buffer of this thread, which stays as it is until the next call.
    unsafe { CStr::from_ptr(sensorium_last_error()) }.to_string_lossy().into_owned()
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| format!("{text:?} contains a NUL byte"))
}

fn milliseconds(duration: Duration) -> i64 {
    // Zero means "for ever" to c10d, and what an `int` can't hold is more than it hands on to `poll`.
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX).clamp(1, i64::from(i32::MAX))
}

fn pointer(tensor: &Tensor) -> *mut C_tensor {
    tensor.as_ptr().cast_mut()
}

/// Calls a constructor of the shim and owns what it made.
fn create<T>(make: impl FnOnce(*mut *mut T) -> c_int) -> Result<NonNull<T>> {
    let mut made = ptr::null_mut();
    check(make(&raw mut made))?;
    NonNull::new(made).ok_or_else(|| "the shim made a null object".to_owned())
}

/// A client of a key-value store, and its server where it was made with a listener.
pub(crate) struct RawStore(NonNull<SensoriumStore>);

// SAFETY: `TCPStore` has no thread affinity, and takes its own mutex in every operation.
unsafe impl Send for RawStore {}
// SAFETY: as above.
unsafe impl Sync for RawStore {}

impl RawStore {
    pub(crate) fn tcp(host: &str, port: u16, listener: Option<OwnedFd>, timeout: Duration) -> Result<Self> {
        let host = c_string(host)?;
        // The server owns and closes the descriptor from here on.
        let listen_fd = listener.map_or(-1, IntoRawFd::into_raw_fd);
        let timeout = milliseconds(timeout);
        // SAFETY: `host` lives through the call and `out` is valid for one write.
        create(|out| unsafe { sensorium_store_tcp(host.as_ptr(), port, listen_fd, timeout, out) }).map(Self)
    }

    /// A connection of its own to the same server: a wait on one does not block calls on the other.
    pub(crate) fn reconnect(&self) -> Result<Self> {
        // SAFETY: the store is live and `out` is valid for one write.
        create(|out| unsafe { sensorium_store_clone(self.0.as_ptr(), out) }).map(Self)
    }

    pub(crate) fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        let key = c_string(key)?;
        // SAFETY: the store is live; key and value live through the call, which copies them.
        check(unsafe { sensorium_store_set(self.0.as_ptr(), key.as_ptr(), value.as_ptr(), value.len()) })
    }

    pub(crate) fn get(&self, key: &str) -> Result<Vec<u8>> {
        let key = c_string(key)?;
        let (mut data, mut length) = (ptr::null_mut(), 0);
        // SAFETY: the store is live, the key lives through the call, both outputs are valid for one write.
        check(unsafe { sensorium_store_get(self.0.as_ptr(), key.as_ptr(), &raw mut data, &raw mut length) })?;
        // SAFETY: on success the shim gave us a buffer of `length` bytes, which is not null.
        let value = unsafe { std::slice::from_raw_parts(data, length) }.to_vec();
        // SAFETY: the buffer is ours and is not used after this.
        unsafe { sensorium_bytes_free(data) };
        Ok(value)
    }

    pub(crate) fn wait(&self, keys: &[String], timeout: Duration) -> Result<()> {
        let keys = keys.iter().map(|key| c_string(key)).collect::<Result<Vec<_>>>()?;
        let pointers: Vec<_> = keys.iter().map(|key| key.as_ptr()).collect();
        // SAFETY: the store is live, `pointers` holds that many strings, and `keys` keeps them alive.
        check(unsafe {
            sensorium_store_wait(self.0.as_ptr(), pointers.as_ptr(), pointers.len(), milliseconds(timeout))
        })
    }

    pub(crate) fn contains(&self, key: &str) -> Result<bool> {
        let key = c_string(key)?;
        let mut found = false;
        // SAFETY: the store is live, the key lives through the call, the output is valid for one write.
        check(unsafe { sensorium_store_check(self.0.as_ptr(), key.as_ptr(), &raw mut found) })?;
        Ok(found)
    }

    pub(crate) fn add(&self, key: &str, amount: i64) -> Result<i64> {
        let key = c_string(key)?;
        let mut sum = 0;
        // SAFETY: the store is live, the key lives through the call, the output is valid for one write.
        check(unsafe { sensorium_store_add(self.0.as_ptr(), key.as_ptr(), amount, &raw mut sum) })?;
        Ok(sum)
    }

    pub(crate) fn delete(&self, key: &str) -> Result<bool> {
        let key = c_string(key)?;
        let mut existed = false;
        // SAFETY: the store is live, the key lives through the call, the output is valid for one write.
        check(unsafe { sensorium_store_delete(self.0.as_ptr(), key.as_ptr(), &raw mut existed) })?;
        Ok(existed)
    }
}

impl Drop for RawStore {
    fn drop(&mut self) {
        // SAFETY: we own the object and nothing uses it after drop.
        unsafe { sensorium_store_free(self.0.as_ptr()) };
    }
}

/// A Gloo process group. Tensors given to it are contiguous CPU tensors with one dimension, which the callers check.
pub(crate) struct RawGroup {
    group: NonNull<SensoriumGroup>,
    /// Held while an operation starts: the operations of a group are numbered without a lock in C++.
    starting: Mutex<()>,
}

// SAFETY: `ProcessGroupGloo` has no thread affinity.
unsafe impl Send for RawGroup {}
// SAFETY: `starting` serialises the calls, and the background threads lock the queue themselves.
unsafe impl Sync for RawGroup {}

impl RawGroup {
    pub(crate) fn gloo(
        store: &RawStore,
        prefix: &str,
        rank: u32,
        size: u32,
        interface: &str,
        timeout: Duration,
    ) -> Result<Self> {
        let (prefix, interface) = (c_string(prefix)?, c_string(interface)?);
        let (rank, size, timeout) = (rank as c_int, size as c_int, milliseconds(timeout));
        let (prefix, interface) = (prefix.as_ptr(), interface.as_ptr());
        // SAFETY: the store is live (C++ takes a share of it), the strings live through the call, `out` takes a write.
        let group = create(|out| unsafe {
            sensorium_group_gloo(store.0.as_ptr(), prefix, rank, size, interface, timeout, out)
        })?;
        Ok(Self { group, starting: Mutex::new(()) })
    }

    pub(crate) fn all_reduce(&self, tensor: &Tensor, reduce: c_int) -> Result<RawWork> {
        // SAFETY: see `start`; the tensor is live and C++ takes a share of it.
        self.start(|group, out| unsafe { sensorium_all_reduce(group, pointer(tensor), reduce, out) })
    }

    pub(crate) fn broadcast(&self, tensor: &Tensor, root: u32) -> Result<RawWork> {
        // SAFETY: as in `all_reduce`.
        self.start(|group, out| unsafe { sensorium_broadcast(group, pointer(tensor), root as c_int, out) })
    }

    pub(crate) fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<RawWork> {
        // SAFETY: as in `all_reduce`, for both tensors.
        self.start(|group, out| unsafe { sensorium_all_gather(group, pointer(output), pointer(input), out) })
    }

    pub(crate) fn all_to_all(&self, output: &Tensor, input: &Tensor) -> Result<RawWork> {
        // SAFETY: as in `all_reduce`, for both tensors.
        self.start(|group, out| unsafe { sensorium_all_to_all(group, pointer(output), pointer(input), out) })
    }

    pub(crate) fn send(&self, tensor: &Tensor, to: u32, tag: c_int) -> Result<RawWork> {
        // SAFETY: as in `all_reduce`.
        self.start(|group, out| unsafe { sensorium_send(group, pointer(tensor), to as c_int, tag, out) })
    }

    pub(crate) fn recv(&self, tensor: &Tensor, from: u32, tag: c_int) -> Result<RawWork> {
        // SAFETY: as in `all_reduce`.
        self.start(|group, out| unsafe { sensorium_recv(group, pointer(tensor), from as c_int, tag, out) })
    }

    pub(crate) fn barrier(&self) -> Result<RawWork> {
        // SAFETY: see `start`.
        self.start(|group, out| unsafe { sensorium_barrier(group, out) })
    }

    /// Starts an operation. `begin` may rely on the group being live, on `out` being valid for one write, and on no
    /// other operation of this group starting meanwhile.
    fn start(&self, begin: impl FnOnce(*mut SensoriumGroup, *mut *mut SensoriumWork) -> c_int) -> Result<RawWork> {
        // A panic cannot leave anything half-done under this lock: it guards no data.
        let _starting = self.starting.lock().unwrap_or_else(PoisonError::into_inner);
        create(|out| begin(self.group.as_ptr(), out)).map(RawWork)
    }
}

impl Drop for RawGroup {
    fn drop(&mut self) {
        // SAFETY: we own the object and nothing uses it after drop. C++ first waits for its background threads.
        unsafe { sensorium_group_free(self.group.as_ptr()) };
    }
}

/// Whether an operation has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    Done,
    Pending,
}

/// An operation that was started. C++ holds shares of its tensors until it ends, also when this is dropped or forgotten.
pub(crate) struct RawWork(NonNull<SensoriumWork>);

// SAFETY: c10d's `Work` locks its state; it may be waited for and released on any thread.
unsafe impl Send for RawWork {}

impl RawWork {
    /// Waits until the operation ends, or for one slice of time.
    pub(crate) fn wait(&mut self, slice: Option<Duration>) -> Result<Progress> {
        // SAFETY: the work is live, and `&mut` keeps others from waiting at the same time.
        match unsafe { sensorium_work_wait(self.0.as_ptr(), slice.map_or(0, milliseconds)) } {
            PENDING => Ok(Progress::Pending),
            status => check(status).map(|()| Progress::Done),
        }
    }
}

impl Drop for RawWork {
    fn drop(&mut self) {
        // SAFETY: we own the object and nothing uses it after drop; a running operation has a share of its own.
        unsafe { sensorium_work_free(self.0.as_ptr()) };
    }
}

/// See [`crate::keep_freed_memory`].
pub(crate) fn keep_freed_memory() {
    // SAFETY: it sets parameters of the allocator, under the allocator's own lock, and takes nothing from here.
    unsafe { sensorium_keep_freed_memory() }
}

/// Runs the backward pass from several outputs. The slices have one length.
pub(crate) fn backward(outputs: &[Tensor], gradients: &[Tensor]) -> Result<()> {
    assert_eq!(outputs.len(), gradients.len(), "each output has a gradient");
    let outputs: Vec<_> = outputs.iter().map(pointer).collect();
    let gradients: Vec<_> = gradients.iter().map(pointer).collect();
    // SAFETY: both lists hold that many pointers to live tensors.
    check(unsafe { sensorium_backward(outputs.as_ptr(), gradients.as_ptr(), outputs.len()) })
}

/// Makes `gradient` the `.grad` of a leaf.
pub(crate) fn set_grad(leaf: &Tensor, gradient: &Tensor) -> Result<()> {
    // SAFETY: both tensors are live; C++ takes a share of the gradient.
    check(unsafe { sensorium_set_grad(pointer(leaf), pointer(gradient)) })
}

/// `tensor += value * a * b`.
pub(crate) fn addcmul(tensor: &Tensor, a: &Tensor, b: &Tensor, value: f64) -> Result<()> {
    // SAFETY: the three tensors are live; C++ checks shapes and kinds.
    check(unsafe { sensorium_addcmul(pointer(tensor), pointer(a), pointer(b), value) })
}

/// `tensor += value * a / b`.
pub(crate) fn addcdiv(tensor: &Tensor, a: &Tensor, b: &Tensor, value: f64) -> Result<()> {
    // SAFETY: as in `addcmul`.
    check(unsafe { sensorium_addcdiv(pointer(tensor), pointer(a), pointer(b), value) })
}
