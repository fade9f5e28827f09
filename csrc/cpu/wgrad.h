// wgrad, by Winograd for 3x3 at stride 1 or by the definition.
//
// Winograd F(3x3,4x4): dw = A^T [ sum over tiles of (G dy G^T) * (B^T a B) ] A with a = prologue(x). A tile is 4x4 of
// dy against 6x6 of a: the tiles, points and B^T of fprop's F(4x4,3x3), so V comes from the same input transform. G
// here is 6x4 (rows 1, p, p^2, p^3 of the points), A^T is 3x6; the 1/prod (p_i - p_j) are in A^T, which runs once a
// filter tap and not once a tile.
//
// Both multiply D, dy in vectors of K, with V, a in panels of C, over tiles or pixels.
#pragma once

#include "conv.h"
#include "gemm.h"

namespace wrn_fast {
namespace WRN_ISA {

constexpr int kWgradMatrices = 36;
// Rows of K in a register block: 8x32 of AVX-512, 4x16 of AVX2, 4x8 of SSE. A divisor of VL, so that the blocks of K
// read whole vectors of D.
constexpr int kWgradRows = VL == 16 ? 8 : 4;

// dw is written whole. Every element is summed in one order whatever args.threads is.
void wgrad(const WgradArgs& args);
void winograd_wgrad(const WgradArgs& args);
void direct_wgrad(const WgradArgs& args);

// What threads share out: panels of C by ranges of K, each writing its own part of dw. Whole panels while every thread
// gets one; the panels left over are cut along K.
struct WgradItems {
  int64_t panels, vectors;  // of C, of K
  int64_t whole, parts, count;

  WgradItems(const ConvShape& s, int threads) {
    panels = panel_count(s.C);
    vectors = (s.K + VL - 1) / VL;
    whole = panels / threads * threads;
    const int64_t rest = panels - whole;
    parts = rest ? threads / rest : 1;
    if (parts > vectors) parts = vectors;
    count = whole + rest * parts;
  }
  int64_t panel(int64_t i) const { return i < whole ? i : whole + (i - whole) / parts; }
  int64_t begin(int64_t i) const { return i < whole ? 0 : (i - whole) % parts * vectors / parts; }
  int64_t end(int64_t i) const { return i < whole ? vectors : ((i - whole) % parts + 1) * vectors / parts; }
};

// The reduction: `steps` steps in runs of `run`. D steps by VL; V by v_step in a run and by v_run from run to run. A
// sum over `runs_per_cut` runs is then added to the sums before it.
struct WgradWalk {
  int64_t steps, run, runs_per_cut;
  int64_t v_step, v_run;
};

// c [VL][nv * VL] = sum over the walk of d[VL] times v[nv * VL].
void wgrad_product(int nv, const float* d, const float* v, const WgradWalk& walk, float* c);

// dy on its way into D [K / VL][36][tiles][VL].
struct GradientInput {
  const void* data;
  DType dtype;
  int64_t P, Q, K;
  int64_t tile_rows, tile_cols;
};

// The strip `row` of `image`; tile j, vector v of channels goes to d[v * panel + xi * plane + j * VL].
void gradient_transform(const GradientInput& in, int64_t image, int64_t row, float* d, int64_t panel, int64_t plane);

// dw [K,3,3,C] at (k0, c0), k_count x c_count elements of it, from products [36][VL][nv * VL]. add: to what is there.
// stream: past the caches, for what is not read again soon (640@8: 12 % of the whole wgrad).
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
