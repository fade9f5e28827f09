// Dropout of fprop's outputs. Not run on a GPU yet.
//
//   v *= word >= threshold ? kept : 0, word = word e & 3 of Philox's block e >> 2, e the element's number in y
//
// A mask of 256 x 160 is 28,000 warp instructions: in the epilogue they would take about as long as the pass over
// memory that they save. So the threads of the prologue, which have little or nothing to do, draw them while the
// products run, a bit an element, and the epilogue multiplies.
#pragma once

#include "common_philox.h"
#include "sm90_hw.cuh"
#include "sm90_plan.h"

namespace wrn_fast {
namespace sm90 {

template <class T, class Params>
SM90_FN bool draws(const Params& p) {
  return !T::dgrad && (p.drop_y || p.drop_act);
}

// Of the barriers of the mask, for a job of this block.
SM90_FN uint32_t mask_phase(int job) {
  return static_cast<uint32_t>(job / hw::blocks()) & 1;
}

// Words that a thread draws for a job.
template <class T>
constexpr int kDrawn = T::Memory::kMaskBytes / 4 / kTransformers;

// Draws words [begin, end) of a thread's, once the consumers are done with the mask before.
template <class T, class Params>
SM90_FN void draw(const Params& p, uint32_t base, int job, const Job& j, int t, int begin, int end) {
  using M = typename T::Memory;
  if (begin == end) return;  // without a wait: the consumers may still read the mask before
  constexpr int words = mask_words(T::block_k);
  const int64_t K = static_cast<int64_t>(T::block_k) * p.schedule.k_blocks;
  const uint64_t seed = static_cast<uint64_t>(hw::from_global(p.rng));
  const uint64_t offset = static_cast<uint64_t>(hw::from_global(p.rng + 1));
  hw::barrier_wait(base + M::barrier(M::kMaskEmpty), mask_phase(job) ^ 1);
#pragma unroll 1
  for (int i = begin * kTransformers + t; i < end * kTransformers; i += kTransformers) {
    const int row = i / words, channel = (i - row * words) * 32;
    const Pixel o = pixel_of_row(p.schedule.tile, row);
    const int64_t first = element_number(p.out[0], K, {j.origin.q + o.q, j.origin.p + o.p, j.origin.n + o.n},
                                         j.k_block * T::block_k + channel);
    uint32_t bits = 0;
#pragma unroll 2
    for (int block = 0; block < 8; ++block) {
      const PhiloxWords drawn = philox(static_cast<uint64_t>(first) / 4 + block, seed, offset);
#pragma unroll
      for (int e = 0; e < 4; ++e) bits |= static_cast<uint32_t>(drawn.w[e] >= p.threshold) << (4 * block + e);
    }
    hw::store_word(base + M::mask() + mask_offset(T::block_k, row, channel), bits);
  }
  if (end == kDrawn<T>) hw::barrier_arrive(base + M::barrier(M::kMaskFull));
}

// A group of 16 columns, dropped. mask: of the lane's upper row. A product, so that a dropped NaN stays NaN.
template <class T, class Params>
SM90_FN void drop_group(const Params& p, uint32_t mask, int lane, int g, float (&acc)[T::block_k / 2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t bits = hw::load_word(mask + mask_offset(T::block_k, 8 * h, 16 * g)) >> (2 * (lane & 3));
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      acc[acc_reg(2 * g + c / 2, h, c & 1)] *= bits >> (16 * (g & 1) + 8 * (c / 2) + (c & 1)) & 1 ? p.kept : 0.f;
    }
  }
}

}  // namespace sm90
}  // namespace wrn_fast
