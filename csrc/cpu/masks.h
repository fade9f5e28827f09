// One bit an element instead of x: what the gradient by x alone needs of a relu or a leaky relu.
//
// A mask is [pixels][ceil(C / 8)] bytes; bit c % 8 of byte c / 8 is 1 where act'(v) is 1. Bits behind C are 0.
#pragma once

#include "elementwise.h"
#include "epilogue.h"
#include "vec.h"

namespace wrn_fast {
namespace WRN_ISA {

#if defined(__AVX512F__)
WRN_INLINE Mask mask_of_bits(unsigned bits) {
  return {static_cast<__mmask16>(bits)};
}
WRN_INLINE unsigned bits_of_mask(Mask m) {
  return m.m;
}
#elif defined(__AVX2__)
WRN_INLINE Mask mask_of_bits(unsigned bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane))};
}
WRN_INLINE unsigned bits_of_mask(Mask m) {
  return static_cast<unsigned>(_mm256_movemask_ps(m.m));
}
#else
WRN_INLINE Mask mask_of_bits(unsigned bits) {
  Mask m;
  for (int i = 0; i < VL; ++i) m.m[i] = (bits >> i & 1u) ? -1 : 0;
  return m;
}
WRN_INLINE unsigned bits_of_mask(Mask m) {
  unsigned bits = 0;
  for (int i = 0; i < VL; ++i) bits |= (m.m[i] ? 1u : 0u) << i;
  return bits;
}
#endif

// The epilogue of dgrad with a mask (null: the identity) in the place of x: dx = dropout'(da) * act' * out_scale.
void (*masked_tile(DType dtype, Act act))(const Epilogue&, const OutTile&);

void act_mask(const MaskArgs& args);

}  // namespace WRN_ISA
}  // namespace wrn_fast
