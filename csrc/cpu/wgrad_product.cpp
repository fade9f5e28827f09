// The product [K x steps][steps x C] of a vector of K and a panel of C, and which wgrad runs.
#include "wgrad.h"

namespace wrn_fast {
namespace WRN_ISA {
namespace {

template <int NV>
WRN_INLINE void block(const float* d, const float* v, const WgradWalk& walk, float* c) {
  constexpr int MR = kWgradRows;
  int64_t step = 0;
  while (step < walk.steps) {
    const bool first = step == 0;
    Vec acc[MR][NV];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) acc[m][n] = zero();
    for (int64_t i = 0; i < walk.runs_per_cut && step < walk.steps; ++i, v += walk.v_run) {
      const int64_t end = step + walk.run < walk.steps ? step + walk.run : walk.steps;
      const float* vp = v;
#pragma GCC unroll 4
      for (; step < end; ++step, d += VL, vp += walk.v_step) {
        Vec vv[NV];
#pragma GCC unroll 2
        for (int n = 0; n < NV; ++n) vv[n] = load(vp + n * VL);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
          const Vec dv = broadcast(d[m]);
#pragma GCC unroll 2
          for (int n = 0; n < NV; ++n) acc[m][n] = fma(dv, vv[n], acc[m][n]);
        }
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) {
        float* out = c + (m * NV + n) * VL;
        store(out, first ? acc[m][n] : load(out) + acc[m][n]);
      }
  }
}

template <int NV>
void product(const float* d, const float* v, const WgradWalk& walk, float* c) {
  for (int row = 0; row < VL; row += kWgradRows) block<NV>(d + row, v, walk, c + row * NV * VL);
}

}  // namespace

void wgrad_product(int nv, const float* d, const float* v, const WgradWalk& walk, float* c) {
  nv == 1 ? product<1>(d, v, walk, c) : product<NV_FULL>(d, v, walk, c);
}

void wgrad(const WgradArgs& args) {
  const ConvShape& s = args.shape;
  if (!s.N)
    memset(args.dw, 0, sizeof(float) * static_cast<size_t>(s.K * s.R * s.S * s.C));
  else
    args.algo == Algo::direct ? direct_wgrad(args) : winograd_wgrad(args);
}

}  // namespace WRN_ISA
}  // namespace wrn_fast
