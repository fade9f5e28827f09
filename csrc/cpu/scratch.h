// Memory that outlives a call: blocks of the calling thread, kept between calls and freed when the thread ends.
//
// An operator adds up its needs, calls scratch_block once before its parallel region (so std::bad_alloc leaves no
// half-started threads behind) and hands parts of the block to its workers. A chain keeps its activations likewise:
// malloc would return them to the system after each call, and the next call would fault every page in again.
#pragma once

#include <cstddef>
#include <cstdint>

namespace wrn_fast {

constexpr int64_t kScratchAlign = 64;
constexpr int64_t kHugePage = int64_t{2} << 20;

// At least `bytes` bytes, 4096-byte aligned, contents undefined; valid until the next call on the same thread.
void* scratch_block(int64_t bytes);
// The same, in a block of its own.
void* activation_block(int64_t bytes);

// Bytes that the calling thread holds, and a way to give them back early.
int64_t scratch_bytes();
void scratch_release();

// Asks for huge pages in the whole ones that lie in [data, data + bytes), before they are first written. Filters, V and
// activations are read with strides over more 4 KB pages than the first-level TLB holds. Where there are none: nothing.
void advise_huge_pages(void* data, int64_t bytes);

// Hands out 64-byte aligned parts; with a null base it only adds up the size.
struct Parts {
  char* base = nullptr;
  int64_t used = 0;

  float* floats(int64_t n) {
    char* p = base ? base + used : nullptr;
    used += (n * static_cast<int64_t>(sizeof(float)) + kScratchAlign - 1) / kScratchAlign * kScratchAlign;
    return reinterpret_cast<float*>(p);
  }
};

}  // namespace wrn_fast
