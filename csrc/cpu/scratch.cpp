// Growing blocks of each calling thread. Compiled once, for the baseline.
#include "scratch.h"

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace wrn_fast {
namespace {

class Block {
 public:
  ~Block() { release(); }

  void release() {
    free(data_);
    data_ = nullptr;
    bytes_ = 0;
  }
  void* at_least(int64_t bytes) {
    if (bytes <= bytes_) return data_;
    const int64_t page = bytes < kHugePage ? 4096 : kHugePage;
    if (bytes < 0 || bytes > INT64_MAX - page) throw std::bad_alloc();
    const int64_t rounded = (bytes + page - 1) / page * page;
    // The old block goes first: its contents are not kept, and both at once would double the peak.
    release();
    data_ = aligned_alloc(static_cast<size_t>(page), static_cast<size_t>(rounded));
    if (!data_) throw std::bad_alloc();
    bytes_ = rounded;
    advise_huge_pages(data_, bytes_);
    return data_;
  }
  int64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

thread_local Block scratch, activations;

}  // namespace

void* scratch_block(int64_t bytes) {
  return scratch.at_least(bytes);
}

void* activation_block(int64_t bytes) {
  return activations.at_least(bytes);
}

int64_t scratch_bytes() {
  return scratch.bytes() + activations.bytes();
}

void scratch_release() {
  scratch.release();
  activations.release();
}

void advise_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t page = static_cast<uintptr_t>(kHugePage),
                  begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page;
  // Refused where the system has none, which costs speed alone.
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin * page), (end - begin) * page, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace wrn_fast
