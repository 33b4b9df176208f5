// The C surface of libtorch's c10d that the Rust module `ffi` calls.
//
// Every function that returns `int` catches all C++ exceptions and answers SENSORIUM_FAILED, with the text in
// sensorium_last_error() of the same thread. Pointers must be live and not null unless it says otherwise.
// Objects are handed out through `out`, which is written only on SENSORIUM_OK, and go back to their `_free`.
#pragma once

#include <cstddef>
#include <cstdint>

#include <torch/torch.h>

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include "guarded.h"

// Beside those of guarded.h.
enum {
  // Only of sensorium_work_wait: the time is over and the operation goes on.
  SENSORIUM_PENDING = 2,
};

struct SensoriumStore {
  c10::intrusive_ptr<c10d::Store> store;
};

struct SensoriumGroup {
  c10::intrusive_ptr<c10d::Backend> backend;
};

struct SensoriumWork {
  c10::intrusive_ptr<c10d::Work> work;
};

extern "C" {

// The text of this thread's last failure; valid until its next call of a function here.
const char* sensorium_last_error();

// ---- store ----------------------------------------------------------------------------------------------------
// A client of the store at host:port. With listen_fd >= 0 also its server, which takes over that bound socket.
int sensorium_store_tcp(const char* host, uint16_t port, int listen_fd, int64_t timeout_ms, SensoriumStore** out);
void sensorium_store_free(SensoriumStore* store);
// A second connection to the same server.
int sensorium_store_clone(SensoriumStore* store, SensoriumStore** out);
int sensorium_store_set(SensoriumStore* store, const char* key, const uint8_t* data, size_t length);
// The value is copied to a buffer that sensorium_bytes_free takes back.
int sensorium_store_get(SensoriumStore* store, const char* key, uint8_t** data, size_t* length);
void sensorium_bytes_free(uint8_t* data);
int sensorium_store_wait(SensoriumStore* store, const char* const* keys, size_t count, int64_t timeout_ms);
int sensorium_store_check(SensoriumStore* store, const char* key, bool* out);
int sensorium_store_add(SensoriumStore* store, const char* key, int64_t amount, int64_t* out);
int sensorium_store_delete(SensoriumStore* store, const char* key, bool* out);

// ---- process group --------------------------------------------------------------------------------------------
// Connects to all peers before it returns. `interface` is the local address to bind to.
int sensorium_group_gloo(SensoriumStore* store, const char* prefix, int rank, int size, const char* interface,
                         int64_t timeout_ms, SensoriumGroup** out);
// Waits until queued operations have ended, each at the latest by the group's timeout.
void sensorium_group_free(SensoriumGroup* group);

// Operations start in the background and must be started by one thread at a time. Tensors are contiguous CPU tensors
// with one dimension; the operation holds shares of them until it ends. `reduce` is a c10d::ReduceOp::RedOpType.
int sensorium_all_reduce(SensoriumGroup* group, at::Tensor* tensor, int reduce, SensoriumWork** out);
int sensorium_broadcast(SensoriumGroup* group, at::Tensor* tensor, int root, SensoriumWork** out);
int sensorium_all_gather(SensoriumGroup* group, at::Tensor* output, at::Tensor* input, SensoriumWork** out);
int sensorium_all_to_all(SensoriumGroup* group, at::Tensor* output, at::Tensor* input, SensoriumWork** out);
int sensorium_send(SensoriumGroup* group, at::Tensor* tensor, int to, int tag, SensoriumWork** out);
int sensorium_recv(SensoriumGroup* group, at::Tensor* tensor, int from, int tag, SensoriumWork** out);
int sensorium_barrier(SensoriumGroup* group, SensoriumWork** out);

// Waits until the operation ends, or at most slice_ms if that is positive. A send or recv takes no slices: Gloo breaks
// the connection when such a wait runs out of time.
int sensorium_work_wait(SensoriumWork* work, int64_t slice_ms);
void sensorium_work_free(SensoriumWork* work);

// ---- memory ---------------------------------------------------------------------------------------------------
// Makes the C library keep freed memory for the next allocation. Does nothing where it is not glibc.
void sensorium_keep_freed_memory();

// ---- autograd -------------------------------------------------------------------------------------------------
int sensorium_backward(at::Tensor* const* outputs, at::Tensor* const* gradients, size_t count);
int sensorium_set_grad(at::Tensor* leaf, at::Tensor* gradient);
int sensorium_addcmul(at::Tensor* tensor, at::Tensor* a, at::Tensor* b, double value);
int sensorium_addcdiv(at::Tensor* tensor, at::Tensor* a, at::Tensor* b, double value);

}  // extern "C"
