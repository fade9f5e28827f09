// wgrad of a 3x3 filter at stride 1 as Winograd F(3x3,4x4): dw = A^T [ sum over tiles of (G dy G^T) * (B^T a B) ] A.
//
// A tile is 4x4 of dy against 6x6 of a = prologue(x): the tiles, points and B^T of fprop's F(4x4,3x3), so V comes from
// the same input transform. G here is 6x4 (rows 1, p, p^2, p^3 of the points), A^T is 3x6; the 1/prod (p_i - p_j) are
// in A^T, which runs once a filter tap and not once a tile.
#pragma once

#include "conv.h"

namespace wrn_fast {
namespace WRN_ISA {

constexpr int kWgradMatrices = 36;
// Rows of K in a register block: 8x32 of AVX-512, 4x16 of AVX2, 4x8 of SSE. A divisor of VL, so that the blocks of K
// read whole vectors of the transformed dy.
constexpr int kWgradRows = VL == 16 ? 8 : 4;

// dw is written whole. Every element is summed in one order whatever args.threads is.
void wgrad(const WgradArgs& args);

// dy on its way into D [K / VL][36][tiles][VL].
struct GradientInput {
  const void* data;
  DType dtype;
  int64_t P, Q, K;
  int64_t tile_rows, tile_cols;
};

// The strip `row` of `image`; tile j, vector v of channels goes to d[v * panel + xi * plane + j * VL].
void gradient_transform(const GradientInput& in, int64_t image, int64_t row, float* d, int64_t panel, int64_t plane);

// products[xi] [VL][nv * VL] = sum over tiles of d[xi] [tile][VL] times v[xi] [tile][nv * VL]; xi planes apart as said.
struct WgradProducts {
  const float* d;
  int64_t d_plane;
  const float* v;
  int64_t v_plane;
  int64_t tiles;
  float* products;
  int64_t products_plane;
};
void wgrad_products(int nv, const WgradProducts& p);

// dw [K,3,3,C] at (k0, c0), k_count x c_count elements of it, from products. add: to what is there. stream: past the
// caches, for what is not read again soon (640@8: 12 % of the whole wgrad).
struct WgradOutput {
  const float* products;
  int64_t products_plane;
  float* dw;
  int64_t C, k0, c0;
  int k_count, c_count;
  bool add, stream;
};
void wgrad_output(int nv, const WgradOutput& o);

}  // namespace WRN_ISA
}  // namespace wrn_fast
