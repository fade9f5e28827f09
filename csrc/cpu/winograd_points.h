// One-dimensional Winograd transforms, points 0, +-5/8, +-3/2 and infinity for M = 4. Rows of B^T are the polynomials
// prod_{j != i} (x - p_j). Rows of A^T are the powers of the points times 1/prod (p_i - p_j), except that of point 0,
// which is in G (filter.cpp).
#pragma once

#include "vec.h"

namespace wrn_fast {
namespace WRN_ISA {

// d[i * sd] -> o[i * so], i < M + 2. F(4,3): 12 operations, all on exact constants.
template <int M>
WRN_INLINE void input_1d(const Vec* d, int sd, Vec* o, int so) {
  const Vec d0 = d[0], d1 = d[sd], d2 = d[2 * sd], d3 = d[3 * sd];
  if constexpr (M == 4) {
    const Vec a = broadcast(5.f / 8), b = broadcast(3.f / 2);
    const Vec aa = broadcast(25.f / 64), bb = broadcast(9.f / 4);
    const Vec aabb = broadcast(225.f / 256), aa_bb = broadcast(169.f / 64);
    const Vec d4 = d[4 * sd], d5 = d[5 * sd];
    const Vec even_a = fnma(bb, d2, d4), odd_a = fnma(bb, d1, d3);
    const Vec even_b = fnma(aa, d2, d4), odd_b = fnma(aa, d1, d3);
    o[0] = fma(aabb, d0, fnma(aa_bb, d2, d4));
    o[so] = fma(a, odd_a, even_a);
    o[2 * so] = fnma(a, odd_a, even_a);
    o[3 * so] = fma(b, odd_b, even_b);
    o[4 * so] = fnma(b, odd_b, even_b);
    o[5 * so] = fma(aabb, d1, fnma(aa_bb, d3, d5));
  } else {
    o[0] = d0 - d2;
    o[so] = d1 + d2;
    o[2 * so] = d2 - d1;
    o[3 * so] = d1 - d3;
  }
}

// p[i * sp], i < M + 2 -> o[i * so], i < M.
template <int M>
WRN_INLINE void output_1d(const Vec* p, int sp, Vec* o, int so) {
  if constexpr (M == 4) {
    constexpr double a = 0.625, b = 1.5, na = 2 * a * a * (a * a - b * b), nb = 2 * b * b * (b * b - a * a);
    const auto constant = [](double v) { return broadcast(static_cast<float>(v)); };
    const Vec even_a = p[sp] + p[2 * sp], odd_a = p[sp] - p[2 * sp];
    const Vec even_b = p[3 * sp] + p[4 * sp], odd_b = p[3 * sp] - p[4 * sp];
    o[0] = fma(constant(1 / na), even_a, fma(constant(1 / nb), even_b, p[0]));
    o[so] = fma(constant(a / na), odd_a, constant(b / nb) * odd_b);
    o[2 * so] = fma(constant(a * a / na), even_a, constant(b * b / nb) * even_b);
    o[3 * so] = fma(constant(a * a * a / na), odd_a, fma(constant(b * b * b / nb), odd_b, p[5 * sp]));
  } else {
    o[0] = p[0] + p[sp] + p[2 * sp];
    o[so] = p[sp] - p[2 * sp] - p[3 * sp];
  }
}

}  // namespace WRN_ISA
}  // namespace wrn_fast
