// Entry points of one instruction set (the table in isa.h points here).
#pragma once

#include "../problem.h"
#include "scratch.h"
#include "vec.h"

namespace wrn_fast {
namespace WRN_ISA {

void fprop(const FpropArgs& args);
void dgrad(const DgradArgs& args);
int64_t packed_size(const PackArgs& args);
void pack(const PackArgs& args);

WRN_INLINE int64_t round_up(int64_t n, int64_t step) {
  return (n + step - 1) / step * step;
}

// The prologue's arrays at a whole number of vectors, absent ones filled in: kernels read them without tails.
struct PaddedAffine {
  float *center, *scale, *shift;  // [padded]; null when the prologue does nothing before dropout
};
WRN_INLINE bool has_affine(const Prologue& p) {
  return p.center || p.scale || p.shift || p.act != Act::identity;
}
WRN_INLINE PaddedAffine reserve_affine(Parts& parts, const Prologue& p, int64_t padded) {
  if (!has_affine(p)) return {nullptr, nullptr, nullptr};
  float* base = parts.floats(3 * padded);
  return {base, base + padded, base + 2 * padded};
}
WRN_INLINE void fill_affine(const PaddedAffine& a, const Prologue& p, int64_t channels, int64_t padded) {
  if (!a.center) return;
  for (int64_t c = 0; c < padded; ++c) {
    const bool real = c < channels;
    a.center[c] = real && p.center ? p.center[c] : 0.f;
    a.scale[c] = real && p.scale ? p.scale[c] : 1.f;
    a.shift[c] = real && p.shift ? p.shift[c] : 0.f;
  }
}

}  // namespace WRN_ISA
}  // namespace wrn_fast
