// Memory that the runs of one module use again and again.
//
// libtorch takes every intermediate tensor from malloc and gives it back. glibc maps large pieces anew each time, so that the
// kernel fills every page of them with zeros: thirteen thousand pages in a run of EfficientNet-lite0, which took 24 ms of the
// processor beside 36 ms of everything else. Here what a run leaves is what the next one takes. A reserve belongs to a module and goes with it, so
// that a model that is let go leaves nothing behind; pieces that no run has asked for in a while go earlier.
//
// Weights are not in it: they are read before any run, and come from malloc as they would otherwise.

#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/alignment.h>
#include <c10/core/impl/alloc_cpu.h>

namespace sensorium {

class Reserve;

// Before the bytes of every piece: who takes it back. As long as the alignment of tensors, which the bytes thereby keep.
struct alignas(c10::gAlignment) Head {
  // Null for a piece that goes back to malloc.
  std::shared_ptr<Reserve> owner;
  size_t bytes = 0;
  uint64_t last_run = 0;
};
static_assert(sizeof(Head) == c10::gAlignment, "tensors begin right behind it");

class Reserve {
 public:
  // Smaller pieces are what malloc is good at.
  static constexpr size_t least_bytes = 64 << 10;

  Reserve() = default;
  Reserve(const Reserve&) = delete;
  Reserve& operator=(const Reserve&) = delete;
  ~Reserve() {
    for (const auto& [bytes, heads] : free_) {
      for (Head* head : heads) discard(head);
    }
  }

  static Head* make(size_t bytes) {
    Head* head = new (c10::alloc_cpu(sizeof(Head) + bytes)) Head;
    head->bytes = bytes;
    return head;
  }

  static void discard(Head* head) {
    head->~Head();
    c10::free_cpu(head);
  }

  // Sizes in steps of an eighth of their power of two, so that batches of nearly the same size share pieces.
  static size_t rounded(size_t bytes) {
    size_t step = least_bytes / 8;
    while (step * 16 <= bytes) step *= 2;
    return (bytes + step - 1) / step * step;
  }

  // A piece of at least so many bytes, and at most twice as many: one that is free, or a new one.
  Head* acquire(size_t bytes) {
    bytes = rounded(bytes);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (Head* const head = take(bytes)) {
        lend(head);
        return head;
      }
    }
    // What cannot be had is not lent: it says nothing of how much runs have.
    Head* const head = make(bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    lend(head);
    return head;
  }

  // Any thread: what a run returns is let go by whoever has sent it.
  void give_back(Head* head) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    lent_ -= head->bytes;
    head->last_run = runs_;
    try {
      free_[head->bytes].push_back(head);
      free_bytes_ += head->bytes;
    } catch (...) {
      // There was not even memory to note it in.
      const auto entry = free_.find(head->bytes);
      if (entry != free_.end() && entry->second.empty()) free_.erase(entry);
      discard(head);
    }
  }

  // A run begins.
  void begin() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (++runs_ % runs_kept != 0) return;
    while (Head* const head = oldest()) {
      if (head->last_run + runs_kept >= runs_) break;
      let_go(head);
    }
    most_lent_before_ = most_lent_;
    most_lent_ = lent_;
    trim();
  }

 private:
  void lend(const Head* head) {
    lent_ += head->bytes;
    most_lent_ = std::max(most_lent_, lent_);
    trim();
  }

  // A piece that so many runs have not asked for is not kept.
  static constexpr uint64_t runs_kept = 64;
  // So many times what runs had at a time may be kept.
  static constexpr size_t pieces_kept = 4;

  // A piece that is free, the smallest that will do, and of these the one that was given back last, which may still be in a cache.
  Head* take(size_t bytes) {
    const auto found = free_.lower_bound(bytes);
    if (found == free_.end() || found->first > 2 * bytes) return nullptr;
    Head* head = found->second.back();
    found->second.pop_back();
    if (found->second.empty()) free_.erase(found);
    free_bytes_ -= head->bytes;
    return head;
  }

  // What is kept is bounded by what runs had at a time of late: requests of ever different sizes would leave a piece of each. A
  // run has pieces of several sizes one after the other, and would fetch all of them anew if it were bounded by the sum of those
  // that it has together.
  void trim() {
    const size_t most = pieces_kept * std::max(most_lent_, most_lent_before_);
    while (lent_ + free_bytes_ > most) {
      Head* const head = oldest();
      if (head == nullptr) return;
      let_go(head);
    }
  }

  // The free piece that no run has had for the longest.
  Head* oldest() const {
    Head* found = nullptr;
    for (const auto& [bytes, heads] : free_) {
      if (found == nullptr || heads.front()->last_run < found->last_run) found = heads.front();
    }
    return found;
  }

  // The first of its size.
  void let_go(Head* head) {
    const auto entry = free_.find(head->bytes);
    entry->second.erase(entry->second.begin());
    if (entry->second.empty()) free_.erase(entry);
    free_bytes_ -= head->bytes;
    discard(head);
  }

  std::mutex mutex_;
  // By size, none of them empty; the one that was given back first is the first.
  std::map<size_t, std::vector<Head*>> free_;
  size_t free_bytes_ = 0;
  size_t lent_ = 0;
  // The most that was lent at a time, in these runs_kept runs and in those before.
  size_t most_lent_ = 0;
  size_t most_lent_before_ = 0;
  uint64_t runs_ = 0;
};

// The reserve of the run that this thread is in.
inline thread_local const std::shared_ptr<Reserve>* current_reserve = nullptr;

// This thread's tensors come from a reserve while this lives.
class Using {
 public:
  explicit Using(const std::shared_ptr<Reserve>& reserve) {
    reserve->begin();
    current_reserve = &reserve;
  }
  Using(const Using&) = delete;
  Using& operator=(const Using&) = delete;
  ~Using() { current_reserve = nullptr; }
};

// Takes the place of libtorch's allocator in this process; outside of runs it is the same.
class ReservingAllocator final : public c10::Allocator {
 public:
  // Once for the process. libtorch keeps it for good.
  static void install() {
    static const bool is_installed = (c10::SetCPUAllocator(new ReservingAllocator), true);
    (void)is_installed;
  }

  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(c10::DeviceType::CPU);
    if (bytes == 0) return {nullptr, nullptr, &release, device};
    Head* head = nullptr;
    if (current_reserve != nullptr && bytes >= Reserve::least_bytes) {
      head = (*current_reserve)->acquire(bytes);
      head->owner = *current_reserve;
    } else {
      head = Reserve::make(bytes);
    }
    void* data = head + 1;
    return {data, data, &release, device};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  static void release(void* data) {
    if (data == nullptr) return;
    Head* head = static_cast<Head*>(data) - 1;
    // It may be all that keeps the reserve, which then takes the piece with it.
    if (const std::shared_ptr<Reserve> owner = std::move(head->owner)) {
      owner->give_back(head);
    } else {
      Reserve::discard(head);
    }
  }
};

}  // namespace sensorium
