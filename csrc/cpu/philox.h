// Dropout's random numbers: Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3,
// SC 2011), one rule in every backend (wrn_fast/random.py):
//
//   element i (64-bit index in NHWC order) takes word i & 3 of the block with key = (seed lo, seed hi) and
//   counter = (i >> 2 lo, i >> 2 hi, offset lo, offset hi), and is kept when word >= threshold.
//
// Several blocks at a time in plain loops over lanes: compilers turn the 32x32 -> 64 bit products into vpmuludq.
#pragma once

#include "../problem.h"
#include "vec.h"

namespace wrn_fast {
namespace WRN_ISA {

constexpr int PHILOX_LANES = 16;
constexpr int PHILOX_GROUP = 4 * PHILOX_LANES;  // elements

// out [4 * LANES]: scale where kept, 0 where dropped, of the elements from 4 * first_block on.
template <int LANES>
WRN_INLINE void philox_group(float* out, uint64_t first_block, const Dropout& d) {
  uint32_t c0[LANES], c1[LANES], c2[LANES], c3[LANES];
  for (int i = 0; i < LANES; ++i) {
    const uint64_t block = first_block + static_cast<uint64_t>(i);
    c0[i] = static_cast<uint32_t>(block);
    c1[i] = static_cast<uint32_t>(block >> 32);
    c2[i] = static_cast<uint32_t>(d.offset);
    c3[i] = static_cast<uint32_t>(d.offset >> 32);
  }
  uint32_t k0 = static_cast<uint32_t>(d.seed), k1 = static_cast<uint32_t>(d.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < LANES; ++i) {
      const uint64_t p0 = static_cast<uint64_t>(c0[i]) * 0xD2511F53u;
      const uint64_t p1 = static_cast<uint64_t>(c2[i]) * 0xCD9E8D57u;
      c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
      c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
      c1[i] = static_cast<uint32_t>(p1);
      c3[i] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int i = 0; i < LANES; ++i) {
    out[4 * i] = c0[i] >= d.threshold ? d.scale : 0.f;
    out[4 * i + 1] = c1[i] >= d.threshold ? d.scale : 0.f;
    out[4 * i + 2] = c2[i] >= d.threshold ? d.scale : 0.f;
    out[4 * i + 3] = c3[i] >= d.threshold ? d.scale : 0.f;
  }
}

// out [n]: what to multiply the elements first, first + 1, ... with: d.scale where kept, 0 where dropped.
static inline __attribute__((noinline, unused)) void dropout_multipliers(float* out, int64_t first, int64_t n,
                                                                         const Dropout& d) {
  const uint64_t block = static_cast<uint64_t>(first) >> 2;
  int64_t at = -(first & 3);
  for (uint64_t i = 0; at < n; i += PHILOX_LANES, at += PHILOX_GROUP) {
    if (at >= 0 && at + PHILOX_GROUP <= n) {
      philox_group<PHILOX_LANES>(out + at, block + i, d);
      continue;
    }
    float group[PHILOX_GROUP];
    philox_group<PHILOX_LANES>(group, block + i, d);
    const int64_t begin = at < 0 ? -at : 0;
    const int64_t end = n - at < PHILOX_GROUP ? n - at : PHILOX_GROUP;
    memcpy(out + at + begin, group + begin, sizeof(float) * static_cast<size_t>(end - begin));
  }
}

// What to multiply the VL elements from `first` on with.
WRN_INLINE Vec dropout_vector(int64_t first, const Dropout& d) {
  // VL / 4 blocks, and one more when `first` is not the first of its block.
  constexpr int lanes = VL / 2;
  float group[4 * lanes];
  philox_group<lanes>(group, static_cast<uint64_t>(first) >> 2, d);
  return load(group + (first & 3));
}

}  // namespace WRN_ISA
}  // namespace wrn_fast
