// The register-blocked micro-kernel and the loop over blocks of rows.
#include "gemm.h"

namespace wrn_fast {
namespace WRN_ISA {
namespace {

// The panel of the next call on its way to the second-level cache, a few lines a cut, evenly over the blocks of this
// one. Otherwise the first block of a panel waits for the L3 or, with few tiles, for DRAM, and the others leave both
// idle.
struct Ahead {
  const char *at, *end;
  int64_t lines;  // a cut

  void fetch() {
    for (int64_t i = 0; i < lines && at < end; ++i, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// sum += the products of one cut: `LENGTH` channels, or `length` where LENGTH is 0 (the last of a segment).
template <int MR, int NV, int LENGTH>
WRN_INLINE void cut(const float* a, const int64_t* offset, const float* b, int64_t length, Vec (*sum)[NV]) {
  Vec acc[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < NV; ++n) acc[m][n] = zero();
#pragma GCC unroll 16
  for (int64_t k = 0; k < (LENGTH ? LENGTH : length); ++k) {
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

// MR rows of C, the first of which is row `q0` of the `r0`th row of pixels.
template <int MR, int NV>
void block(const Segment* segments, int n_segments, int64_t r0, int64_t q0, int64_t cols, float* c, int64_t ldc,
           Ahead& ahead) {
  int64_t r[MR], q[MR];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
    r[m] = r0;
    q[m] = q0;
    if (++q0 == cols) q0 = 0, ++r0;
  }
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
    int64_t k = 0;
    for (; k + kCut <= g.length; k += kCut) {
      ahead.fetch();
      cut<MR, NV, kCut>(g.a + k, offset, g.b + k * NV * VL, kCut, sum);
    }
    if (k < g.length) cut<MR, NV, 0>(g.a + k, offset, g.b + k * NV * VL, g.length - k, sum);
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < NV; ++n) store(c + m * ldc + n * VL, sum[m][n]);
}

using BlockFn = void (*)(const Segment*, int, int64_t, int64_t, int64_t, float*, int64_t, Ahead&);

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

void gemm_panel(int nv, const Segment* segments, int n_segments, int64_t rows, int64_t cols, float* c, int64_t ldc,
                const float* next) {
  // Even blocks (32 = 7 + 7 + 6 + 6 + 6) keep every block near the full register tile.
  const int64_t blocks = (rows + MR_MAX - 1) / MR_MAX;
  // A single block has no second reading of its own panel to hide the fetch behind.
  Ahead ahead = {};
  if (next && blocks > 1) {
    const int64_t bytes = segments[0].length * nv * VL * 4, cuts = blocks * (segments[0].length / kCut);
    ahead.at = reinterpret_cast<const char*>(next);
    ahead.end = ahead.at + bytes;
    ahead.lines = cuts ? (bytes / 64 + cuts - 1) / cuts : 0;
  }
  int64_t row = 0, r = 0, q = 0;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t end = rows * (i + 1) / blocks;
    const int count = static_cast<int>(end - row);
    const BlockFn run = nv == 1 ? block_of<1>(count) : block_of<NV_FULL>(count);
    run(segments, n_segments, r, q, cols, c + row * ldc, ldc, ahead);
    row = end;
    for (q += count; q >= cols; q -= cols) ++r;
  }
}

}  // namespace WRN_ISA
}  // namespace wrn_fast
