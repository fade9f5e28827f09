// Activations on vectors: forward and derivative, as functions of the pre-activation v.
//
//   identity  v              1
//   relu      max(v, 0)      v <= 0 ? 0 : 1    NaN stays NaN, and lets the gradient pass, as in PyTorch
//   leaky     v > 0 ? v : slope*v             1 or slope
//   silu      v*s            s*(1 + v*(1-s))  s = 1/(1 + exp(-v))
#pragma once

#include "../problem.h"
#include "vec.h"

namespace wrn_fast {
namespace WRN_ISA {

// exp, below 2 ulp; 0 under -104, infinity over 88.73, NaN stays NaN.
WRN_INLINE Vec exp(Vec x) {
  x = max(broadcast(-104.5f), min(broadcast(89.f), x));
  const Vec n = round_even(x * broadcast(1.44269504088896341f));
  // ln 2 in two parts: the first has 9 trailing zero bits, so n times it is exact.
  Vec r = fnma(n, broadcast(0.693359375f), x);
  r = fnma(n, broadcast(-2.12194440e-4f), r);
  Vec p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p, r * r, r) + broadcast(1.f);
  // 2^n in two factors: one alone would overflow at 2^128 and lose the denormals.
  const Vec half = round_even(n * broadcast(0.5f));
  return p * pow2(half) * pow2(n - half);
}

WRN_INLINE Vec sigmoid(Vec v) {
  return broadcast(1.f) / (broadcast(1.f) + exp(zero() - v));
}

template <Act act>
WRN_INLINE Vec activate(Vec v, Vec slope) {
  if constexpr (act == Act::relu) return max(zero(), v);
  if constexpr (act == Act::leaky_relu) return select(greater(v, zero()), v, v * slope);
  if constexpr (act == Act::silu) return v / (broadcast(1.f) + exp(zero() - v));
  return v;
}

template <Act act>
WRN_INLINE Vec activate_grad(Vec v, Vec slope) {
  if constexpr (act == Act::relu) return select(less_equal(v, zero()), zero(), broadcast(1.f));
  if constexpr (act == Act::leaky_relu) return select(greater(v, zero()), broadcast(1.f), slope);
  if constexpr (act == Act::silu) {
    const Vec s = sigmoid(v);
    return s * fma(v, broadcast(1.f) - s, broadcast(1.f));
  }
  return broadcast(1.f);
}

// For places where one predictable branch a vector is cheaper than four instances.
WRN_INLINE Vec activate(Act act, Vec v, Vec slope) {
  switch (act) {
    case Act::relu:
      return activate<Act::relu>(v, slope);
    case Act::leaky_relu:
      return activate<Act::leaky_relu>(v, slope);
    case Act::silu:
      return activate<Act::silu>(v, slope);
    default:
      return v;
  }
}
WRN_INLINE Vec activate_grad(Act act, Vec v, Vec slope) {
  switch (act) {
    case Act::relu:
      return activate_grad<Act::relu>(v, slope);
    case Act::leaky_relu:
      return activate_grad<Act::leaky_relu>(v, slope);
    case Act::silu:
      return activate_grad<Act::silu>(v, slope);
    default:
      return broadcast(1.f);
  }
}

// v of the prologue; absent arrays are skipped. c counts channels, n the channels left from c on.
WRN_INLINE Vec pre_activation(const Prologue& p, Vec x, int64_t c, int64_t n) {
  if (p.center) x -= load_upto(p.center + c, n);
  if (p.scale && p.shift) return fma(x, load_upto(p.scale + c, n), load_upto(p.shift + c, n));
  if (p.scale) return x * load_upto(p.scale + c, n);
  if (p.shift) return x + load_upto(p.shift + c, n);
  return x;
}

}  // namespace WRN_ISA
}  // namespace wrn_fast
