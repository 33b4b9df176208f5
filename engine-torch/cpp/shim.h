// The C surface of libtorch's TorchScript that the Rust module `ffi` calls.
//
// Every function that returns `int` catches all C++ exceptions and answers SENSORIUM_FAILED, with the text in
// sensorium_torch_last_error() of the same thread. Pointers must be live and not null unless it says otherwise. Objects
// are handed out through `out`, which is written only on SENSORIUM_OK, and go back to their `_free`.
#pragma once

#include <cstddef>
#include <cstdint>

#include "guarded.h"

// Beside SENSORIUM_OK and SENSORIUM_FAILED, of what runs on a GPU: it failed, and nothing on that GPU will do otherwise in this
// process.
enum { SENSORIUM_LOST = 2 };

// What an argument of `forward` is; for lists of text, elements are encoded as in the inference protocol.
enum {
  SENSORIUM_ARGUMENT_TENSOR = 0,
  SENSORIUM_ARGUMENT_INT = 1,
  SENSORIUM_ARGUMENT_FLOAT = 2,
  SENSORIUM_ARGUMENT_BOOL = 3,
  SENSORIUM_ARGUMENT_STRINGS = 4,
  SENSORIUM_ARGUMENT_OTHER = 5,
};

// What `forward` returns.
enum {
  // One tensor, or one list of texts.
  SENSORIUM_RESULT_ONE = 0,
  // A tuple: `count` of them.
  SENSORIUM_RESULT_TUPLE = 1,
  // As many as a run gives.
  SENSORIUM_RESULT_LIST = 2,
  // By name, as many as a run gives.
  SENSORIUM_RESULT_DICT = 3,
  SENSORIUM_RESULT_OTHER = 4,
};

struct SensoriumModule;
struct SensoriumTensor;

struct SensoriumArgument {
  int32_t kind;
  // Whether a call may leave it out: it has a default, or may be None.
  int32_t may_lack;
  // Both live as long as the module.
  const char* name;
  const char* type;
};

struct SensoriumResult {
  int32_t kind;
  size_t count;
  const char* type;
};

// One value on its way in or out. An input without `data` is left out, unless it has no elements.
struct SensoriumView {
  int32_t is_there;
  // A SENSORIUM_DTYPE of shim.cpp; see `dtypes` there.
  int32_t dtype;
  const uint8_t* data;
  size_t bytes;
  const int64_t* sizes;
  size_t dims;
  // The key in a dict or the field of a named tuple; null elsewhere.
  const char* name;
};

// What a compiled module has beside its code.
struct SensoriumAttribute {
  const char* name;
  // A tensor, unless `module` names a file.
  SensoriumView tensor;
  const char* module;
};

extern "C" {

// The text of this thread's last failure; valid until its next call of a function here.
const char* sensorium_torch_last_error();

// Makes the GPU of this index usable: loads libtorch's part for GPUs, which the process has from then on. Fails where there is
// no such part, no driver or no such GPU.
int sensorium_torch_need_gpu(int index);

// Reads a module on to the GPU of index `gpu`, which sensorium_torch_need_gpu has found usable; on to the processor where it is
// negative.
int sensorium_torch_load(const char* path, int gpu, SensoriumModule** out);
void sensorium_torch_free(SensoriumModule* module);

size_t sensorium_torch_argument_count(const SensoriumModule* module);
void sensorium_torch_argument(const SensoriumModule* module, size_t index, SensoriumArgument* out);
void sensorium_torch_result(const SensoriumModule* module, SensoriumResult* out);
// The name of a field of a named tuple; null where it has none.
const char* sensorium_torch_result_field(const SensoriumModule* module, size_t index);
// Whether the module has a method of this name that takes nothing.
int sensorium_torch_has_method(const SensoriumModule* module, const char* method);

// Runs `forward` on `count` inputs, one for each argument, with `threads` threads of this thread's own pool. Inputs are
// copied to where the module is, and what it gives to the processor's memory. `capacity` tensors at most are written to `tensors`, and how many there are to `found`: more than `capacity`
// is a failure. Each belongs to the caller.
int sensorium_torch_run(
    SensoriumModule* module,
    const SensoriumView* inputs,
    size_t count,
    int threads,
    int optimize,
    SensoriumTensor** tensors,
    size_t capacity,
    size_t* found);

// Runs a method that takes nothing, for what it does to the module.
int sensorium_torch_call(SensoriumModule* module, const char* method, int threads, int optimize);

// What a tensor holds; valid until it is freed. Any thread may read, and free.
void sensorium_torch_view(const SensoriumTensor* tensor, SensoriumView* out);
void sensorium_torch_tensor_free(SensoriumTensor* tensor);

// Threads that this thread's operators use.
int sensorium_torch_threads();

// Compiles TorchScript source, the methods of a module with these attributes, into a file.
int sensorium_torch_compile(
    const char* source,
    const SensoriumAttribute* attributes,
    size_t count,
    const char* path);

}  // extern "C"
