// Units of work shared out to torch's own thread pool, each worker with scratch memory of its own.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "moats.h"

namespace sightline {

// Scratch that a thread keeps between calls, as long as it is not large: a page fault a call costs more than the call.
// Much of it is asked for in huge pages, where the system gives them: fewer faults, and fewer addresses to look up.
class Arena {
 public:
  float* floats(int64_t count) {
    size_t page = (size_t)count * sizeof(float) > kHugePage / 2 ? kHugePage : 4096;
    size_t bytes = ((size_t)count * sizeof(float) + page - 1) / page * page;
    if (bytes > size_) {
      free(data_);
      data_ = nullptr, size_ = 0;
      data_ = (float*)aligned_alloc(page, bytes);
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
#if defined(MADV_HUGEPAGE)
      if (page == kHugePage) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
    }
    dig_moat(data_, count, (int64_t)(size_ / sizeof(float)));
    return data_;
  }
  void trim() {
    if (size_ <= kKept) return;
    free(data_);
    data_ = nullptr, size_ = 0;
  }
  ~Arena() { free(data_); }

 private:
  static constexpr size_t kKept = size_t{64} << 20, kHugePage = size_t{2} << 20;
  float* data_ = nullptr;
  size_t size_ = 0;
};

class Lease {
 public:
  explicit Lease(Arena& arena) : arena_(arena) {}
  ~Lease() { arena_.trim(); }
  float* floats(int64_t count) { return arena_.floats(count); }

 private:
  Arena& arena_;
};

inline thread_local Arena shared_arena, worker_arena;

inline int64_t workers_for(int64_t units, double work) {
  constexpr double kWorthAThread = 2e5;  // multiply-adds: some microseconds, what waking a thread costs
  int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), units);
  return std::max<int64_t>(1, std::min<int64_t>(threads, (int64_t)(work / kWorthAThread)));
}

// body(unit, scratch) for every unit. Units are taken as workers come free; none needs another's result, and what a
// unit computes does not depend on who computes it.
template <typename Body>
void share_out(int64_t units, double work, int64_t scratch_floats, const Body& body) {
  if (units <= 0) return;
  int64_t workers = workers_for(units, work);
  int64_t room = (scratch_floats + 1023) / 1024 * 1024 + 16;  // + a line: workers' scratch must not share sets
  Lease lease(worker_arena);
  float* scratch = lease.floats(workers * room);
  if (workers == 1) {
    for (int64_t unit = 0; unit < units; ++unit) body(unit, scratch);
    return;
  }
  std::atomic<int64_t> next{0}, started{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    float* mine = scratch + started.fetch_add(1) * room;
    for (int64_t unit = next.fetch_add(1); unit < units; unit = next.fetch_add(1)) body(unit, mine);
  });
}

}  // namespace sightline
