// The 36 products [K x tiles][tiles x C], a register block of rows of K by one or two vectors of C.
//
// Sums are cut every kCut tiles as in gemm.h: without, the error at 8 x 160@32 (512 tiles) is 1.6e-6, with it 6e-7.
#include "gemm.h"
#include "wgrad.h"

namespace wrn_fast {
namespace WRN_ISA {
namespace {

// c [kWgradRows][NV * VL] = sum over tiles of d[tile][rows] * v[tile][columns]; d and v step by VL and NV * VL.
template <int NV>
WRN_INLINE void block(const float* d, const float* v, int64_t tiles, float* c) {
  constexpr int MR = kWgradRows;
  for (int64_t begin = 0; begin < tiles; begin += kCut) {
    const int64_t end = tiles - begin < kCut ? tiles : begin + kCut;
    Vec acc[MR][NV];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) acc[m][n] = zero();
#pragma GCC unroll 4
    for (int64_t t = begin; t < end; ++t) {
      Vec vv[NV];
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) vv[n] = load(v + t * NV * VL + n * VL);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const Vec dv = broadcast(d[t * VL + m]);
#pragma GCC unroll 2
        for (int n = 0; n < NV; ++n) acc[m][n] = fma(dv, vv[n], acc[m][n]);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) {
        float* out = c + (m * NV + n) * VL;
        store(out, begin ? load(out) + acc[m][n] : acc[m][n]);
      }
  }
}

template <int NV>
void products(const WgradProducts& p) {
  for (int xi = 0; xi < kWgradMatrices; ++xi)
    for (int row = 0; row < VL; row += kWgradRows)
      block<NV>(p.d + xi * p.d_plane + row, p.v + xi * p.v_plane, p.tiles,
                p.products + xi * p.products_plane + row * NV * VL);
}

}  // namespace

void wgrad_products(int nv, const WgradProducts& p) {
  nv == 1 ? products<1>(p) : products<NV_FULL>(p);
}

}  // namespace WRN_ISA
}  // namespace wrn_fast
