#include "shim.h"

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <new>
#include <string>
#include <vector>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <c10/util/Logging.h>
#include <torch/csrc/autograd/autograd.h>

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

namespace {

using sensorium::guarded;
using std::chrono::milliseconds;

// c10d also writes what it throws to stderr, as a warning with a stack trace of dozens of lines. Here every failure comes
// back as an error, so that is noise in the caller's log. TORCH_CPP_LOG_LEVEL brings it back.
void quieten() {
  static const bool once = [] {
    if (std::getenv("TORCH_CPP_LOG_LEVEL") == nullptr) FLAGS_caffe2_log_level = 2;  // ERROR
    return true;
  }();
  (void)once;
}

template <typename Start>
int started(SensoriumWork** out, Start&& start) noexcept {
  return guarded([&] { *out = new SensoriumWork{start()}; });
}

// c10d takes lists, one tensor per device of this process; we have one.
std::vector<at::Tensor> only(const at::Tensor* tensor) {
  return {*tensor};
}

}  // namespace

extern "C" {

const char* sensorium_last_error() {
  return sensorium::last_error;
}

// ---- store ----------------------------------------------------------------------------------------------------

int sensorium_store_tcp(const char* host, uint16_t port, int listen_fd, int64_t timeout_ms, SensoriumStore** out) {
  return guarded([&] {
    quieten();
    c10d::TCPStoreOptions options;
    options.port = port;
    options.timeout = milliseconds(timeout_ms);
    // Who joins is the group's matter: a store may serve several groups.
    options.waitWorkers = false;
    if (listen_fd >= 0) {
      options.isServer = true;
      options.masterListenFd = listen_fd;
    }
    *out = new SensoriumStore{c10::make_intrusive<c10d::TCPStore>(host, options)};
  });
}

void sensorium_store_free(SensoriumStore* store) {
  guarded([&] { delete store; });
}

int sensorium_store_clone(SensoriumStore* store, SensoriumStore** out) {
  return guarded([&] { *out = new SensoriumStore{store->store->clone()}; });
}

int sensorium_store_set(SensoriumStore* store, const char* key, const uint8_t* data, size_t length) {
  return guarded([&] { store->store->set(key, std::vector<uint8_t>(data, data + length)); });
}

int sensorium_store_get(SensoriumStore* store, const char* key, uint8_t** data, size_t* length) {
  return guarded([&] {
    const std::vector<uint8_t> value = store->store->get(key);
    // malloc(0) may be null.
    auto* copy = static_cast<uint8_t*>(std::malloc(std::max<size_t>(value.size(), 1)));
    if (copy == nullptr) throw std::bad_alloc();
    std::copy(value.begin(), value.end(), copy);
    *data = copy;
    *length = value.size();
  });
}

void sensorium_bytes_free(uint8_t* data) {
  std::free(data);
}

int sensorium_store_wait(SensoriumStore* store, const char* const* keys, size_t count, int64_t timeout_ms) {
  return guarded([&] { store->store->wait(std::vector<std::string>(keys, keys + count), milliseconds(timeout_ms)); });
}

int sensorium_store_check(SensoriumStore* store, const char* key, bool* out) {
  return guarded([&] { *out = store->store->check({key}); });
}

int sensorium_store_add(SensoriumStore* store, const char* key, int64_t amount, int64_t* out) {
  return guarded([&] { *out = store->store->add(key, amount); });
}

int sensorium_store_delete(SensoriumStore* store, const char* key, bool* out) {
  return guarded([&] { *out = store->store->deleteKey(key); });
}

// ---- process group --------------------------------------------------------------------------------------------

int sensorium_group_gloo(SensoriumStore* store, const char* prefix, int rank, int size, const char* interface,
                         int64_t timeout_ms, SensoriumGroup** out) {
  return guarded([&] {
    auto options = c10d::ProcessGroupGloo::Options::create(milliseconds(timeout_ms));
    // Not lazy: a peer that cannot be reached is to show here, not in some later operation.
    options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname(interface, /*lazyInit=*/false));
    auto keys = c10::make_intrusive<c10d::PrefixStore>(prefix, store->store);
    *out = new SensoriumGroup{c10::make_intrusive<c10d::ProcessGroupGloo>(keys, rank, size, options)};
  });
}

void sensorium_group_free(SensoriumGroup* group) {
  guarded([&] { delete group; });
}

int sensorium_all_reduce(SensoriumGroup* group, at::Tensor* tensor, int reduce, SensoriumWork** out) {
  return started(out, [&] {
    auto tensors = only(tensor);
    c10d::AllreduceOptions options;
    options.reduceOp = static_cast<c10d::ReduceOp::RedOpType>(reduce);
    return group->backend->allreduce(tensors, options);
  });
}

int sensorium_broadcast(SensoriumGroup* group, at::Tensor* tensor, int root, SensoriumWork** out) {
  return started(out, [&] {
    auto tensors = only(tensor);
    c10d::BroadcastOptions options;
    options.rootRank = root;
    return group->backend->broadcast(tensors, options);
  });
}

int sensorium_all_gather(SensoriumGroup* group, at::Tensor* output, at::Tensor* input, SensoriumWork** out) {
  return started(out, [&] { return group->backend->_allgather_base(*output, *input); });
}

int sensorium_all_to_all(SensoriumGroup* group, at::Tensor* output, at::Tensor* input, SensoriumWork** out) {
  return started(out, [&] {
    // No counts: equal parts.
    std::vector<int64_t> output_counts, input_counts;
    return group->backend->alltoall_base(*output, *input, output_counts, input_counts);
  });
}

int sensorium_send(SensoriumGroup* group, at::Tensor* tensor, int to, int tag, SensoriumWork** out) {
  return started(out, [&] {
    auto tensors = only(tensor);
    return group->backend->send(tensors, to, tag);
  });
}

int sensorium_recv(SensoriumGroup* group, at::Tensor* tensor, int from, int tag, SensoriumWork** out) {
  return started(out, [&] {
    auto tensors = only(tensor);
    return group->backend->recv(tensors, from, tag);
  });
}

int sensorium_barrier(SensoriumGroup* group, SensoriumWork** out) {
  return started(out, [&] { return group->backend->barrier(); });
}

int sensorium_work_wait(SensoriumWork* work, int64_t slice_ms) {
  const int status = guarded([&] { work->work->wait(milliseconds(slice_ms)); });
  if (status == SENSORIUM_OK || slice_ms <= 0) return status;
  // c10d throws when a slice is over, too. An operation may have ended since: then only another wait tells how.
  bool completed = true;
  if (guarded([&] { completed = work->work->isCompleted(); }) != SENSORIUM_OK) return status;
  return completed ? guarded([&] { work->work->wait(); }) : SENSORIUM_PENDING;
}

void sensorium_work_free(SensoriumWork* work) {
  guarded([&] { delete work; });
}

// ---- memory ---------------------------------------------------------------------------------------------------

void sensorium_keep_freed_memory() {
#ifdef __GLIBC__
  mallopt(M_MMAP_THRESHOLD, 32 << 20);  // the most that every version takes
  mallopt(M_TRIM_THRESHOLD, INT_MAX);
#endif
}

// ---- autograd -------------------------------------------------------------------------------------------------

int sensorium_backward(at::Tensor* const* outputs, at::Tensor* const* gradients, size_t count) {
  return guarded([&] {
    torch::autograd::variable_list roots, seeds;
    for (size_t i = 0; i < count; ++i) {
      roots.push_back(*outputs[i]);
      seeds.push_back(*gradients[i]);
    }
    torch::autograd::backward(roots, seeds);
  });
}

int sensorium_set_grad(at::Tensor* leaf, at::Tensor* gradient) {
  return guarded([&] { leaf->mutable_grad() = *gradient; });
}

int sensorium_addcmul(at::Tensor* tensor, at::Tensor* a, at::Tensor* b, double value) {
  return guarded([&] { tensor->addcmul_(*a, *b, value); });
}

int sensorium_addcdiv(at::Tensor* tensor, at::Tensor* a, at::Tensor* b, double value) {
  return guarded([&] { tensor->addcdiv_(*a, *b, value); });
}

}  // extern "C"
