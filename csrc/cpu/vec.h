// A vector of VL floats, one definition an instruction set.
//
// Every kernel source is compiled once per instruction set with -DWRN_ISA=avx512|avx2|portable and the matching
// -m flags. All code lives in namespace wrn_fast::WRN_ISA: an inline function that two of those objects shared would
// be merged by the linker, and an old CPU would run the wide copy. For the same reason no std:: template is used here.
//
// NaN: `max(a, b)` and `min(a, b)` return b when either operand is NaN, as the x86 instruction does, so
// `max(zero(), v)` keeps a NaN of v. `-ffp-contract=off` keeps a*b+c two roundings unless fma() is written.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef WRN_ISA
#error "compile kernel sources with -DWRN_ISA=avx512, avx2 or portable"
#endif

#define WRN_INLINE static inline __attribute__((always_inline))

namespace wrn_fast {

// Storage type only; arithmetic is always fp32. Shared with plain sources, hence outside WRN_ISA.
struct bf16 {
  uint16_t bits;
};

namespace WRN_ISA {

#if defined(__AVX512F__)

constexpr int VL = 16;
struct Vec {
  __m512 v;
};
struct Mask {
  __mmask16 m;
};

WRN_INLINE __mmask16 lanes(int n) {
  return static_cast<__mmask16>((1u << n) - 1u);
}
WRN_INLINE Vec zero() {
  return {_mm512_setzero_ps()};
}
WRN_INLINE Vec broadcast(float a) {
  return {_mm512_set1_ps(a)};
}
WRN_INLINE Vec load(const float* p) {
  return {_mm512_loadu_ps(p)};
}
WRN_INLINE Vec load_n(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(lanes(n), p)};
}
WRN_INLINE void store(float* p, Vec a) {
  _mm512_storeu_ps(p, a.v);
}
WRN_INLINE void store_n(float* p, Vec a, int n) {
  _mm512_mask_storeu_ps(p, lanes(n), a.v);
}
WRN_INLINE void stream(float* p, Vec a) {
  _mm512_stream_ps(p, a.v);
}
WRN_INLINE Vec operator+(Vec a, Vec b) {
  return {_mm512_add_ps(a.v, b.v)};
}
WRN_INLINE Vec operator-(Vec a, Vec b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
WRN_INLINE Vec operator*(Vec a, Vec b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
WRN_INLINE Vec operator/(Vec a, Vec b) {
  return {_mm512_div_ps(a.v, b.v)};
}
WRN_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
WRN_INLINE Vec fnma(Vec a, Vec b, Vec c) {
  return {_mm512_fnmadd_ps(a.v, b.v, c.v)};
}
WRN_INLINE Vec max(Vec a, Vec b) {
  return {_mm512_max_ps(a.v, b.v)};
}
WRN_INLINE Vec min(Vec a, Vec b) {
  return {_mm512_min_ps(a.v, b.v)};
}
WRN_INLINE Mask greater(Vec a, Vec b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)};
}
WRN_INLINE Mask less_equal(Vec a, Vec b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)};
}
WRN_INLINE Mask is_nan(Vec a) {
  return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)};
}
WRN_INLINE Vec select(Mask m, Vec a, Vec b) {
  return {_mm512_mask_blend_ps(m.m, b.v, a.v)};
}
WRN_INLINE Vec round_even(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
WRN_INLINE Vec pow2(Vec n) {
  return {
      _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
}

WRN_INLINE Vec widen(__m256i h) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
WRN_INLINE __m256i narrow(Vec a) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i even = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(is_nan(a).m, even, quiet));
}
WRN_INLINE Vec load(const bf16* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
WRN_INLINE void store(bf16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a));
}
// AVX512VL and AVX512BW are required together with AVX512F, so the masked 16-bit forms exist.
WRN_INLINE Vec load_n(const bf16* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(lanes(n), p));
}
WRN_INLINE void store_n(bf16* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, lanes(n), narrow(a));
}

#elif defined(__AVX2__)

constexpr int VL = 8;
struct Vec {
  __m256 v;
};
struct Mask {
  __m256 m;
};

WRN_INLINE __m256i lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
WRN_INLINE Vec zero() {
  return {_mm256_setzero_ps()};
}
WRN_INLINE Vec broadcast(float a) {
  return {_mm256_set1_ps(a)};
}
WRN_INLINE Vec load(const float* p) {
  return {_mm256_loadu_ps(p)};
}
WRN_INLINE Vec load_n(const float* p, int n) {
  return {_mm256_maskload_ps(p, lanes(n))};
}
WRN_INLINE void store(float* p, Vec a) {
  _mm256_storeu_ps(p, a.v);
}
WRN_INLINE void store_n(float* p, Vec a, int n) {
  _mm256_maskstore_ps(p, lanes(n), a.v);
}
WRN_INLINE void stream(float* p, Vec a) {
  _mm256_stream_ps(p, a.v);
}
WRN_INLINE Vec operator+(Vec a, Vec b) {
  return {_mm256_add_ps(a.v, b.v)};
}
WRN_INLINE Vec operator-(Vec a, Vec b) {
  return {_mm256_sub_ps(a.v, b.v)};
}
WRN_INLINE Vec operator*(Vec a, Vec b) {
  return {_mm256_mul_ps(a.v, b.v)};
}
WRN_INLINE Vec operator/(Vec a, Vec b) {
  return {_mm256_div_ps(a.v, b.v)};
}
WRN_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
WRN_INLINE Vec fnma(Vec a, Vec b, Vec c) {
  return {_mm256_fnmadd_ps(a.v, b.v, c.v)};
}
WRN_INLINE Vec max(Vec a, Vec b) {
  return {_mm256_max_ps(a.v, b.v)};
}
WRN_INLINE Vec min(Vec a, Vec b) {
  return {_mm256_min_ps(a.v, b.v)};
}
WRN_INLINE Mask greater(Vec a, Vec b) {
  return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)};
}
WRN_INLINE Mask less_equal(Vec a, Vec b) {
  return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)};
}
WRN_INLINE Mask is_nan(Vec a) {
  return {_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)};
}
WRN_INLINE Vec select(Mask m, Vec a, Vec b) {
  return {_mm256_blendv_ps(b.v, a.v, m.m)};
}
WRN_INLINE Vec round_even(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
WRN_INLINE Vec pow2(Vec n) {
  return {
      _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23))};
}

WRN_INLINE Vec load(const bf16* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
WRN_INLINE void store(bf16* p, Vec a) {
  const __m256i u = _mm256_castps_si256(a.v);
  const __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i even = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  const __m256i h = _mm256_blendv_epi8(even, quiet, _mm256_castps_si256(is_nan(a).m));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(h, h), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

#else

// GCC/Clang vector extensions: SSE2 on x86-64, NEON on aarch64, plain code elsewhere. No fused multiply-add is assumed.
constexpr int VL = 4;
typedef float vfloat __attribute__((vector_size(16)));
typedef int32_t vint __attribute__((vector_size(16)));
struct Vec {
  vfloat v;
};
struct Mask {
  vint m;
};

WRN_INLINE Vec zero() {
  return {vfloat{0.f, 0.f, 0.f, 0.f}};
}
WRN_INLINE Vec broadcast(float a) {
  return {vfloat{a, a, a, a}};
}
WRN_INLINE Vec load(const float* p) {
  Vec r;
  memcpy(&r.v, p, sizeof r.v);
  return r;
}
WRN_INLINE void store(float* p, Vec a) {
  memcpy(p, &a.v, sizeof a.v);
}
WRN_INLINE Vec load_n(const float* p, int n) {
  Vec r = zero();
  memcpy(&r.v, p, sizeof(float) * static_cast<size_t>(n));
  return r;
}
WRN_INLINE void store_n(float* p, Vec a, int n) {
  memcpy(p, &a.v, sizeof(float) * static_cast<size_t>(n));
}
WRN_INLINE void stream(float* p, Vec a) {
  store(p, a);
}
WRN_INLINE Vec operator+(Vec a, Vec b) {
  return {a.v + b.v};
}
WRN_INLINE Vec operator-(Vec a, Vec b) {
  return {a.v - b.v};
}
WRN_INLINE Vec operator*(Vec a, Vec b) {
  return {a.v * b.v};
}
WRN_INLINE Vec operator/(Vec a, Vec b) {
  return {a.v / b.v};
}
WRN_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return {a.v * b.v + c.v};
}
WRN_INLINE Vec fnma(Vec a, Vec b, Vec c) {
  return {c.v - a.v * b.v};
}
WRN_INLINE Mask greater(Vec a, Vec b) {
  return {a.v > b.v};
}
WRN_INLINE Mask less_equal(Vec a, Vec b) {
  return {a.v <= b.v};
}
WRN_INLINE Mask is_nan(Vec a) {
  return {a.v != a.v};
}
WRN_INLINE Vec select(Mask m, Vec a, Vec b) {
  return {reinterpret_cast<vfloat>((m.m & reinterpret_cast<vint>(a.v)) | (~m.m & reinterpret_cast<vint>(b.v)))};
}
WRN_INLINE Vec max(Vec a, Vec b) {
  return select(greater(a, b), a, b);
}
WRN_INLINE Vec min(Vec a, Vec b) {
  return select(greater(b, a), a, b);
}
WRN_INLINE Vec round_even(Vec a) {
  // Adding 1.5 * 2^23 leaves no fraction bits: right for |a| < 2^22, all that exp() needs.
  const vfloat magic = {12582912.f, 12582912.f, 12582912.f, 12582912.f};
  volatile vfloat shifted = a.v + magic;
  return {shifted - magic};
}
WRN_INLINE Vec pow2(Vec n) {
  vint e;
  for (int i = 0; i < VL; ++i) e[i] = (static_cast<int32_t>(n.v[i]) + 127) * (1 << 23);
  return {reinterpret_cast<vfloat>(e)};
}

WRN_INLINE Vec load(const bf16* p) {
  vint u;
  for (int i = 0; i < VL; ++i) u[i] = static_cast<int32_t>(static_cast<uint32_t>(p[i].bits) << 16);
  return {reinterpret_cast<vfloat>(u)};
}
WRN_INLINE void store(bf16* p, Vec a) {
  for (int i = 0; i < VL; ++i) {
    float f = a.v[i];
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    p[i].bits = static_cast<uint16_t>(f != f ? (u >> 16) | 0x40u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
}

#endif

#if !defined(__AVX512F__)
WRN_INLINE Vec load_n(const bf16* p, int n) {
  bf16 t[VL] = {};
  memcpy(t, p, sizeof(bf16) * static_cast<size_t>(n));
  return load(t);
}
WRN_INLINE void store_n(bf16* p, Vec a, int n) {
  bf16 t[VL];
  store(t, a);
  memcpy(p, t, sizeof(bf16) * static_cast<size_t>(n));
}
#endif

// stream() is a store past the caches to an address aligned to the vector; other threads see it after the fence.
WRN_INLINE void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

WRN_INLINE Vec& operator+=(Vec& a, Vec b) {
  return a = a + b;
}
WRN_INLINE Vec& operator-=(Vec& a, Vec b) {
  return a = a - b;
}
WRN_INLINE Vec& operator*=(Vec& a, Vec b) {
  return a = a * b;
}

// n counts the elements left in the row: a whole vector when n >= VL, else the first n lanes (others read as zero).
template <class T>
WRN_INLINE Vec load_upto(const T* p, int64_t n) {
  return n >= VL ? load(p) : load_n(p, static_cast<int>(n));
}
template <class T>
WRN_INLINE void store_upto(T* p, Vec a, int64_t n) {
  if (n >= VL)
    store(p, a);
  else
    store_n(p, a, static_cast<int>(n));
}

// The value that a store to T and a load back would give.
WRN_INLINE Vec rounded(const float*, Vec a) {
  return a;
}
WRN_INLINE Vec rounded(const bf16*, Vec a) {
  bf16 t[VL];
  store(t, a);
  return load(t);
}

WRN_INLINE float sum(Vec a) {
  float t[VL];
  store(t, a);
  for (int n = VL / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) t[i] += t[i + n];
  return t[0];
}

}  // namespace WRN_ISA
}  // namespace wrn_fast
