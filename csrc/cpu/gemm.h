// The one GEMM under Winograd and the direct convolution: C[t][n] = sum over segments and c of A[t][c] * B[c][n].
//
// A is read in place, row by row (a pixel or a tile, channels contiguous); B is a packed panel of NV*VL columns.
// The accumulators of an MR x NV*VL block never leave registers for a cut of kCut channels; a cut is then added to sums
// that stay in registers too (AVX-512) or in the first-level cache, and C is written once. Cutting shortens the chains
// of fp32 additions: F(4x4) at C=160 0.98e-6 uncut, 5.2e-7 cut at 32, 4.7e-7 at 16. Sums in registers: 0.97 of a loop
// of FMAs alone against 0.92 with 14x32 blocks whose cuts are added in memory (Zen 4, operands in cache, C=160). The
// order of additions is fixed by (segment, cut), never by blocks of rows or threads.
#pragma once

#include "vec.h"

namespace wrn_fast {
namespace WRN_ISA {

constexpr int kCut = 16;
// Columns of a full panel: two vectors. 7x32 twice (products of a cut, sums) and three operands fill the 32 AVX-512
// registers; 6x16 fills the 16 of AVX2, 6x8 the 16 of SSE.
constexpr int NV_FULL = 2;
constexpr int NR = NV_FULL * VL;
constexpr int MR_MAX = VL == 16 ? 7 : 6;

// One stretch of the reduction: a Winograd product has one, a 3x3 filter nine, a 1x1 shortcut adds one more.
struct Segment {
  const float* a;              // row t at a + t / cols * row_step + t % cols * col_step
  int64_t row_step, col_step;  // floats
  const float* b;              // [length][nv * VL]
  int64_t length;
};

// Panels of K columns: all NR wide, but the last one VL wide when that covers its columns.
WRN_INLINE int64_t panel_count(int64_t columns) {
  return (columns + NR - 1) / NR;
}
WRN_INLINE int panel_vectors(int64_t columns, int64_t panel) {
  return columns - panel * NR <= VL ? 1 : NV_FULL;
}

// C has `rows` rows of nv*VL floats, ldc apart; cols: rows of A in a row of pixels. next: the panel of the following
// call, as long as the first segment's, to be fetched meanwhile; may be null.
void gemm_panel(int nv, const Segment* segments, int n_segments, int64_t rows, int64_t cols, float* c, int64_t ldc,
                const float* next);

}  // namespace WRN_ISA
}  // namespace wrn_fast
