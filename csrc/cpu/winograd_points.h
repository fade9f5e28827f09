// One-dimensional Winograd transforms, points 0, +-5/8, +-3/2 and infinity for f4, +-3/8, +-5/4 and infinity for f3.
// Rows of B^T are the polynomials prod_{j != i} (x - p_j), columns of A^T the powers of the points; 1/prod (p_i - p_j)
// is in G (filter.cpp). So every constant here is exact in fp32. A rounded one would scale all products of a matrix by
// the same 1 + 5e-8, in every pixel, channel and layer: in pooled features of WRN-28-10 these added up to six times the
// error of eager PyTorch, whose own roundings cancel there.
//
// f2s2: y0 = w0 d0 + w1 d1 + w2 d2, y1 = w0 d2 + w1 d3 + w2 d4 is F(2,2) of the taps w0, w2 on the even inputs (three
// products) and w1 on the odd ones (two products with one filter): 5 for 6, 25 for 36 in two dimensions.
#pragma once

#include "../problem.h"
#include "vec.h"

namespace wrn_fast {
namespace WRN_ISA {

// In one dimension: outputs of a tile, products, and distinct filter values among these; input pixels from one tile to
// the next.
constexpr int tile_outputs(Algo algo) {
  return algo == Algo::f4 ? 4 : algo == Algo::f3 ? 3 : 2;
}
constexpr int tile_products(Algo algo) {
  return algo == Algo::f4 ? 6 : algo == Algo::f2 ? 4 : 5;
}
constexpr int tile_filters(Algo algo) {
  return algo == Algo::f4 ? 6 : algo == Algo::f3 ? 5 : 4;
}
constexpr int tile_step(Algo algo) {
  return algo == Algo::f2 ? 2 : algo == Algo::f3 ? 3 : 4;
}

// d[i * sd] -> o[i * so], i < tile_products. F(4,3): 12 operations, all on exact constants.
template <Algo ALGO>
WRN_INLINE void input_1d(const Vec* d, int sd, Vec* o, int so) {
  const Vec d0 = d[0], d1 = d[sd], d2 = d[2 * sd], d3 = d[3 * sd];
  if constexpr (ALGO == Algo::f2s2) {
    o[0] = d0 - d2;
    o[so] = d2;
    o[2 * so] = d[4 * sd] - d2;
    o[3 * so] = d1;
    o[4 * so] = d3;
  } else if constexpr (ALGO == Algo::f4) {
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
  } else if constexpr (ALGO == Algo::f3) {
    const Vec a = broadcast(3.f / 8), b = broadcast(5.f / 4);
    const Vec aa = broadcast(9.f / 64), bb = broadcast(25.f / 16);
    const Vec even_a = fnma(bb, d0, d2), odd_a = fnma(bb, d1, d3);
    const Vec even_b = fnma(aa, d0, d2), odd_b = fnma(aa, d1, d3);
    o[0] = fma(a, even_a, odd_a);
    o[so] = fnma(a, even_a, odd_a);
    o[2 * so] = fma(b, even_b, odd_b);
    o[3 * so] = fnma(b, even_b, odd_b);
    o[4 * so] = fma(broadcast(225.f / 1024), d0, fnma(broadcast(109.f / 64), d2, d[4 * sd]));
  } else {
    o[0] = d0 - d2;
    o[so] = d1 + d2;
    o[2 * so] = d2 - d1;
    o[3 * so] = d1 - d3;
  }
}

// p[i * sp], i < tile_products -> o[i * so], i < tile_outputs.
template <Algo ALGO>
WRN_INLINE void output_1d(const Vec* p, int sp, Vec* o, int so) {
  if constexpr (ALGO == Algo::f2s2) {
    o[0] = p[0] + p[sp] + p[3 * sp];
    o[so] = p[sp] + p[2 * sp] + p[4 * sp];
  } else if constexpr (ALGO == Algo::f4) {
    const Vec a = broadcast(5.f / 8), b = broadcast(3.f / 2);
    const Vec even_a = p[sp] + p[2 * sp], odd_a = p[sp] - p[2 * sp];
    const Vec even_b = p[3 * sp] + p[4 * sp], odd_b = p[3 * sp] - p[4 * sp];
    o[0] = even_a + (even_b + p[0]);
    o[so] = fma(a, odd_a, b * odd_b);
    o[2 * so] = fma(broadcast(25.f / 64), even_a, broadcast(9.f / 4) * even_b);
    o[3 * so] = fma(broadcast(125.f / 512), odd_a, fma(broadcast(27.f / 8), odd_b, p[5 * sp]));
  } else if constexpr (ALGO == Algo::f3) {
    // The scales of two opposite points differ in sign alone; the sign is here, so that G has one scale for both.
    const Vec even_a = p[0] - p[sp], odd_a = p[0] + p[sp];
    const Vec even_b = p[2 * sp] - p[3 * sp], odd_b = p[2 * sp] + p[3 * sp];
    o[0] = even_a + even_b;
    o[so] = fma(broadcast(3.f / 8), odd_a, broadcast(5.f / 4) * odd_b);
    o[2 * so] = fma(broadcast(9.f / 64), even_a, fma(broadcast(25.f / 16), even_b, p[4 * sp]));
  } else {
    o[0] = p[0] + p[sp] + p[2 * sp];
    o[so] = p[sp] - p[2 * sp] - p[3 * sp];
  }
}

}  // namespace WRN_ISA
}  // namespace wrn_fast
