// Output transform of one tile: A^T M A into a small tile that the epilogue reads while it is in L1.
#include "winograd.h"
#include "winograd_points.h"

namespace wrn_fast {
namespace WRN_ISA {
namespace {

template <Algo ALGO>
void tile(const float* products, int nv, float* out) {
  constexpr int M = tile_outputs(ALGO), n = tile_products(ALGO);
  const int width = nv * VL;
  for (int c = 0; c < width; c += VL) {
    Vec t[M * n];
#pragma GCC unroll 6
    for (int j = 0; j < n; ++j) {
      Vec p[n];
#pragma GCC unroll 6
      for (int i = 0; i < n; ++i) p[i] = load(products + (i * n + j) * width + c);
      output_1d<ALGO>(p, 1, t + j, n);
    }
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      Vec o[M];
      output_1d<ALGO>(t + i * n, 1, o, 1);
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) store(out + (i * M + j) * width + c, o[j]);
    }
  }
}

}  // namespace

OutputTransform output_transform(Algo algo) {
  if (algo == Algo::f2s2) return tile<Algo::f2s2>;
  if (algo == Algo::f2) return tile<Algo::f2>;
  return algo == Algo::f3 ? tile<Algo::f3> : tile<Algo::f4>;
}

}  // namespace WRN_ISA
}  // namespace wrn_fast
