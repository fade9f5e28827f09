// One growing block a calling thread. Compiled once, for the baseline.
#include "scratch.h"

#include <cstdlib>
#include <new>

namespace wrn_fast {
namespace {

struct Block {
  void* data = nullptr;
  int64_t bytes = 0;

  void release() {
    free(data);
    data = nullptr;
    bytes = 0;
  }
  ~Block() { release(); }
};

thread_local Block block;

}  // namespace

void* scratch_block(int64_t bytes) {
  if (bytes <= block.bytes) return block.data;
  constexpr int64_t page = 4096;
  if (bytes < 0 || bytes > INT64_MAX - page) throw std::bad_alloc();
  const int64_t rounded = (bytes + page - 1) / page * page;
  // The old block goes first: its contents are not kept, and both at once would double the peak.
  block.release();
  block.data = aligned_alloc(page, static_cast<size_t>(rounded));
  if (!block.data) throw std::bad_alloc();
  block.bytes = rounded;
  return block.data;
}

int64_t scratch_bytes() {
  return block.bytes;
}

void scratch_release() {
  block.release();
}

}  // namespace wrn_fast
