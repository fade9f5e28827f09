// One-dimensional Winograd transforms. Rows of B^T are the polynomials prod_{j != i} (x - p_j), rows of A^T the powers
// of the points; the 1/prod (p_i - p_j) are all in G (filter.cpp).
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
    const Vec a = broadcast(5.f / 8), b = broadcast(3.f / 2);
    const Vec aa = broadcast(25.f / 64), bb = broadcast(9.f / 4);
    const Vec aaa = broadcast(125.f / 512), bbb = broadcast(27.f / 8);
    const Vec even_a = p[sp] + p[2 * sp], odd_a = p[sp] - p[2 * sp];
    const Vec even_b = p[3 * sp] + p[4 * sp], odd_b = p[3 * sp] - p[4 * sp];
    o[0] = p[0] + even_a + even_b;
    o[so] = fma(a, odd_a, b * odd_b);
    o[2 * so] = fma(aa, even_a, bb * even_b);
    o[3 * so] = fma(aaa, odd_a, fma(bbb, odd_b, p[5 * sp]));
  } else {
    o[0] = p[0] + p[sp] + p[2 * sp];
    o[so] = p[sp] - p[2 * sp] - p[3 * sp];
  }
}

}  // namespace WRN_ISA
}  // namespace wrn_fast
