// The register-blocked micro-kernel and the loop over blocks of rows.
#include "gemm.h"

namespace wrn_fast {
namespace WRN_ISA {
namespace {

// sum += the products of one cut of `length` channels.
template <int MR, int NV>
WRN_INLINE void cut(const float* a, const int64_t* offset, const float* b, int64_t length, Vec (*sum)[NV]) {
  Vec acc[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < NV; ++n) acc[m][n] = zero();
#pragma GCC unroll 4
  for (int64_t k = 0; k < length; ++k) {
    Vec bv[NV];
#pragma GCC unroll 2
    for (int n = 0; n < NV; ++n) bv[n] = load(b + n * VL);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const Vec av = broadcast(a[offset[m] + k]);
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) acc[m][n] = fma(av, bv[n], acc[m][n]);
    }
    b += NV * VL;
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < NV; ++n) sum[m][n] += acc[m][n];
}

// Rows [row, row + MR) of C.
template <int MR, int NV>
void block(const Segment* segments, int n_segments, int64_t row, int64_t cols, float* c, int64_t ldc) {
  int64_t r[MR], q[MR];
  for (int m = 0; m < MR; ++m) r[m] = (row + m) / cols, q[m] = (row + m) % cols;
  Vec sum[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < NV; ++n) sum[m][n] = zero();
  for (int s = 0; s < n_segments; ++s) {
    const Segment& g = segments[s];
    int64_t offset[MR];
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) offset[m] = r[m] * g.row_step + q[m] * g.col_step;
    for (int64_t k = 0; k < g.length; k += kCut) {
      const int64_t length = g.length - k < kCut ? g.length - k : kCut;
      cut<MR, NV>(g.a + k, offset, g.b + k * NV * VL, length, sum);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < NV; ++n) store(c + m * ldc + n * VL, sum[m][n]);
}

using BlockFn = void (*)(const Segment*, int, int64_t, int64_t, float*, int64_t);

template <int NV>
BlockFn block_of(int rows) {
  switch (rows) {
    case 1:
      return block<1, NV>;
    case 2:
      return block<2, NV>;
    case 3:
      return block<3, NV>;
    case 4:
      return block<4, NV>;
    case 5:
      return block<5, NV>;
    case 6:
      return block<6, NV>;
#if defined(__AVX512F__)
    case 7:
      return block<7, NV>;
#endif
    default:
      return nullptr;
  }
}

}  // namespace

void gemm_panel(int nv, const Segment* segments, int n_segments, int64_t rows, int64_t cols, float* c, int64_t ldc) {
  // Even blocks (32 = 7 + 7 + 6 + 6 + 6) keep every block near the full register tile.
  const int64_t blocks = (rows + MR_MAX - 1) / MR_MAX;
  int64_t row = 0;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t end = rows * (i + 1) / blocks;
    const int count = static_cast<int>(end - row);
    const BlockFn run = nv == 1 ? block_of<1>(count) : block_of<NV_FULL>(count);
    run(segments, n_segments, row, cols, c + row * ldc, ldc);
    row = end;
  }
}

}  // namespace WRN_ISA
}  // namespace wrn_fast
