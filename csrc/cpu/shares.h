// Items 0..n-1 in contiguous shares, one a thread: a thread takes its own from the front and, when it has none left,
// others' from the back.
//
// Layer after layer a thread so meets the images that it wrote itself. Where a cache line takes 165 ns from core to
// core (34 where they seem to have a third-level cache in common; on a virtual machine that changes by the minute),
// chunks handed out in the order of arrival made a batch of 32 of WRN-40-2 take 67 ms, shares 53.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>

namespace wrn_fast {
namespace WRN_ISA {

class Shares {
 public:
  // Two lines a share: the neighbouring line is often fetched along.
  static constexpr int64_t kFloatsEach = 32;
  static int64_t floats(int64_t threads) { return threads * kFloatsEach; }

  // memory: floats(threads) floats that outlive the object; items < 2^32.
  Shares(float* memory, int64_t items, int64_t threads) : memory_(memory), threads_(threads) {
    for (int64_t i = 0; i < threads; ++i)
      new (memory + i * kFloatsEach) Range(packed(i * items / threads, (i + 1) * items / threads));
  }

  // The next item of thread `id` in [0, threads), or -1. Fewer threads than shares finish all items as well.
  int64_t take(int64_t id) const {
    int64_t item = take(share(id), true);
    for (int64_t i = 1; item < 0 && i < threads_; ++i) item = take(share((id + i) % threads_), false);
    return item;
  }

 private:
  // begin in the upper half, end in the lower.
  using Range = std::atomic<uint64_t>;

  static uint64_t packed(int64_t begin, int64_t end) {
    return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end);
  }
  Range& share(int64_t i) const { return *std::launder(reinterpret_cast<Range*>(memory_ + i * kFloatsEach)); }

  static int64_t take(Range& range, bool front) {
    uint64_t now = range.load(std::memory_order_relaxed);
    for (;;) {
      const auto begin = static_cast<int64_t>(now >> 32), end = static_cast<int64_t>(now & 0xffffffffu);
      if (begin >= end) return -1;
      const uint64_t next = front ? packed(begin + 1, end) : packed(begin, end - 1);
      if (range.compare_exchange_weak(now, next, std::memory_order_relaxed)) return front ? begin : end - 1;
    }
  }

  float* memory_;
  int64_t threads_;
};

}  // namespace WRN_ISA
}  // namespace wrn_fast
