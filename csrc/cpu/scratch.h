// Scratch memory: one block per calling thread, kept between calls and freed when the thread ends.
//
// An operator adds up its needs, calls scratch_block once before its parallel region (so std::bad_alloc leaves no
// half-started threads behind) and hands parts of the block to its workers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace wrn_fast {

constexpr int64_t kScratchAlign = 64;

// At least `bytes` bytes, 4096-byte aligned, contents undefined; valid until the next call on the same thread.
void* scratch_block(int64_t bytes);

// Bytes that the calling thread holds, and a way to give them back early.
int64_t scratch_bytes();
void scratch_release();

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
