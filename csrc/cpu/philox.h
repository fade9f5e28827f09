// Dropout's random numbers: Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3,
// SC 2011), one rule in every backend (wrn_fast/random.py):
//
//   element i (64-bit index in NHWC order) takes word i & 3 of the block with key = (seed lo, seed hi) and
//   counter = (i >> 2 lo, i >> 2 hi, offset lo, offset hi), and is kept when word >= threshold.
//
// VL blocks at a time, a block a lane. Lane 4 * L + p computes block L + p * VL / 4: after the 4x4 transposes inside
// each 128 bits the words then lie in the order of the elements.
#pragma once

#include "../problem.h"
#include "vec.h"

namespace wrn_fast {
namespace WRN_ISA {

constexpr int PHILOX_GROUP = 4 * VL;  // elements

#if defined(__AVX512F__)

struct Words {
  __m512i v;
};
WRN_INLINE Words words(uint32_t a) {
  return {_mm512_set1_epi32(static_cast<int>(a))};
}
WRN_INLINE Words words(const uint32_t* p) {
  return {_mm512_loadu_si512(p)};
}
WRN_INLINE Words operator^(Words a, Words b) {
  return {_mm512_xor_si512(a.v, b.v)};
}
// High and low halves of the 64-bit products.
WRN_INLINE void multiply(Words a, uint32_t b, Words& high, Words& low) {
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(b));
  const __m512i even = _mm512_mul_epu32(a.v, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), factor);
  high.v = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
  low.v = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
}
WRN_INLINE void transpose(Words& a, Words& b, Words& c, Words& d) {
  const __m512i ab = _mm512_unpacklo_epi32(a.v, b.v), cd = _mm512_unpacklo_epi32(c.v, d.v);
  const __m512i AB = _mm512_unpackhi_epi32(a.v, b.v), CD = _mm512_unpackhi_epi32(c.v, d.v);
  a.v = _mm512_unpacklo_epi64(ab, cd);
  b.v = _mm512_unpackhi_epi64(ab, cd);
  c.v = _mm512_unpacklo_epi64(AB, CD);
  d.v = _mm512_unpackhi_epi64(AB, CD);
}
WRN_INLINE Vec kept(Words a, uint32_t threshold, float scale) {
  return {_mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask(a.v, words(threshold).v), _mm512_set1_ps(scale))};
}

#elif defined(__AVX2__)

struct Words {
  __m256i v;
};
WRN_INLINE Words words(uint32_t a) {
  return {_mm256_set1_epi32(static_cast<int>(a))};
}
WRN_INLINE Words words(const uint32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
WRN_INLINE Words operator^(Words a, Words b) {
  return {_mm256_xor_si256(a.v, b.v)};
}
WRN_INLINE void multiply(Words a, uint32_t b, Words& high, Words& low) {
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(b));
  const __m256i even = _mm256_mul_epu32(a.v, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), factor);
  high.v = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  low.v = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
WRN_INLINE void transpose(Words& a, Words& b, Words& c, Words& d) {
  const __m256i ab = _mm256_unpacklo_epi32(a.v, b.v), cd = _mm256_unpacklo_epi32(c.v, d.v);
  const __m256i AB = _mm256_unpackhi_epi32(a.v, b.v), CD = _mm256_unpackhi_epi32(c.v, d.v);
  a.v = _mm256_unpacklo_epi64(ab, cd);
  b.v = _mm256_unpackhi_epi64(ab, cd);
  c.v = _mm256_unpacklo_epi64(AB, CD);
  d.v = _mm256_unpackhi_epi64(AB, CD);
}
WRN_INLINE Vec kept(Words a, uint32_t threshold, float scale) {
  const __m256i keep = _mm256_cmpeq_epi32(_mm256_max_epu32(a.v, words(threshold).v), a.v);
  return {_mm256_and_ps(_mm256_castsi256_ps(keep), _mm256_set1_ps(scale))};
}

#else

struct Words {
  uint32_t v[VL];
};
WRN_INLINE Words words(uint32_t a) {
  Words w;
  for (int i = 0; i < VL; ++i) w.v[i] = a;
  return w;
}
WRN_INLINE Words words(const uint32_t* p) {
  Words w;
  memcpy(w.v, p, sizeof w.v);
  return w;
}
WRN_INLINE Words operator^(Words a, Words b) {
  for (int i = 0; i < VL; ++i) a.v[i] ^= b.v[i];
  return a;
}
WRN_INLINE void multiply(Words a, uint32_t b, Words& high, Words& low) {
  for (int i = 0; i < VL; ++i) {
    const uint64_t p = static_cast<uint64_t>(a.v[i]) * b;
    high.v[i] = static_cast<uint32_t>(p >> 32);
    low.v[i] = static_cast<uint32_t>(p);
  }
}
WRN_INLINE void transpose(Words& a, Words& b, Words& c, Words& d) {
  Words* rows[4] = {&a, &b, &c, &d};
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < i; ++j) {
      const uint32_t t = rows[i]->v[j];
      rows[i]->v[j] = rows[j]->v[i];
      rows[j]->v[i] = t;
    }
}
WRN_INLINE Vec kept(Words a, uint32_t threshold, float scale) {
  float t[VL];
  for (int i = 0; i < VL; ++i) t[i] = a.v[i] >= threshold ? scale : 0.f;
  return load(t);
}

#endif

// out [4][VL]: scale where kept, 0 where dropped, of the VL elements from 4 * first_block + p * step on, p = 0 to 3.
WRN_INLINE void philox_group(float* out, uint64_t first_block, uint64_t step, const Dropout& d) {
  uint32_t low[VL], high[VL];
  for (int i = 0; i < VL; ++i) {
    const uint64_t block = first_block + static_cast<uint64_t>(i % 4) * (step >> 2) + static_cast<uint64_t>(i / 4);
    low[i] = static_cast<uint32_t>(block);
    high[i] = static_cast<uint32_t>(block >> 32);
  }
  Words c0 = words(low), c1 = words(high);
  Words c2 = words(static_cast<uint32_t>(d.offset)), c3 = words(static_cast<uint32_t>(d.offset >> 32));
  uint32_t k0 = static_cast<uint32_t>(d.seed), k1 = static_cast<uint32_t>(d.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    Words high0, low0, high1, low1;
    multiply(c0, 0xD2511F53u, high0, low0);
    multiply(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ words(k0);
    c1 = low1;
    c2 = high0 ^ c3 ^ words(k1);
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  transpose(c0, c1, c2, c3);
  store(out, kept(c0, d.threshold, d.scale));
  store(out + VL, kept(c1, d.threshold, d.scale));
  store(out + 2 * VL, kept(c2, d.threshold, d.scale));
  store(out + 3 * VL, kept(c3, d.threshold, d.scale));
}

// out [n]: what to multiply the elements first, first + 1, ... with: d.scale where kept, 0 where dropped.
static inline __attribute__((noinline, unused)) void dropout_multipliers(float* out, int64_t first, int64_t n,
                                                                         const Dropout& d) {
  const uint64_t block = static_cast<uint64_t>(first) >> 2;
  int64_t at = -(first & 3);
  for (uint64_t i = 0; at < n; i += VL, at += PHILOX_GROUP) {
    if (at >= 0 && at + PHILOX_GROUP <= n) {
      philox_group(out + at, block + i, VL, d);
      continue;
    }
    float group[PHILOX_GROUP];
    philox_group(group, block + i, VL, d);
    const int64_t begin = at < 0 ? -at : 0;
    const int64_t end = n - at < PHILOX_GROUP ? n - at : PHILOX_GROUP;
    memcpy(out + at + begin, group + begin, sizeof(float) * static_cast<size_t>(end - begin));
  }
}

// What to multiply the VL elements from `first` on with.
WRN_INLINE Vec dropout_vector(int64_t first, const Dropout& d) {
  float group[PHILOX_GROUP];
  philox_group(group, static_cast<uint64_t>(first) >> 2, VL, d);
  return load(group + (first & 3));
}

// dropout_vector at first, first + step, ...: four of them a draw, where both are multiples of 4.
class DropoutRow {
 public:
  DropoutRow(const Dropout& d, int64_t first, int64_t step) : d_(d), first_(first), step_(step) {}

  // To be called with j = 0, 1, 2, ...
  Vec operator()(int64_t j) {
    const int64_t at = first_ + j * step_;
    if ((first_ | step_) & 3) return dropout_vector(at, d_);
    if (j % 4 == 0) philox_group(group_, static_cast<uint64_t>(at) >> 2, static_cast<uint64_t>(step_), d_);
    return load(group_ + j % 4 * VL);
  }

 private:
  const Dropout& d_;
  int64_t first_, step_;
  float group_[PHILOX_GROUP];
};

}  // namespace WRN_ISA
}  // namespace wrn_fast
