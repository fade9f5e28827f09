// wgrad by the definition, any filter and stride: dw[k][r][s][c] = sum over pixels of dy[p][q][k] * a[p, q at tap r,
// s][c].
//
// Output rows come in chunks. All threads put dy of a chunk into D and the R rows of a that each output row meets, with
// their zero border, into V; then they take items, and every tap is one product that reads V in place.
#include <omp.h>

#include "direct.h"
#include "wgrad.h"

namespace wrn_fast {
namespace WRN_ISA {
namespace {

// Every chunk adds to dw once. 512 pixels of 160@32 at stride 2 are 2 MB of V.
constexpr int64_t kChunkPixels = 512;

struct Rows {
  int64_t count, chunk;

  explicit Rows(const ConvShape& s) {
    count = s.N * s.P;
    const int64_t most = s.Q < kChunkPixels ? kChunkPixels / s.Q : 1;
    const int64_t chunks = (count + most - 1) / most;
    chunk = (count + chunks - 1) / chunks;
  }
};

struct Buffers {
  PaddedAffine affine;
  float *d, *v, *products, *row, *multipliers;
  int64_t d_vector, row_floats, multipliers_floats;
};

Buffers lay_out(Parts& parts, const WgradArgs& args, const DirectSource& a, const DirectSource& dy, const Rows& rows,
                int64_t vectors) {
  const ConvShape& s = args.shape;
  Buffers b = {};
  b.affine = reserve_affine(parts, a.prologue, a.padded);
  b.d_vector = rows.chunk * s.Q * VL;
  b.row_floats = round_up(dy.cols * dy.padded, 16);
  b.multipliers_floats = a.prologue.dropout.active ? round_up(s.W * s.C + VL, 16) : 0;
  b.d = parts.floats(vectors * b.d_vector);
  b.v = parts.floats(rows.chunk * s.R * a.cols * a.padded);
  b.products = parts.floats(args.threads * VL * NR);
  b.row = parts.floats(args.threads * b.row_floats);
  b.multipliers = parts.floats(args.threads * b.multipliers_floats);
  return b;
}

// Row [Q][padded] of dy into d[vector][q][VL].
void scatter(const DirectSource& dy, const float* row, float* d, int64_t d_vector) {
  for (int64_t k = 0; k < dy.padded; k += VL, d += d_vector)
    for (int64_t q = 0; q < dy.cols; ++q) store(d + q * VL, load(row + q * dy.padded + k));
}

// products [VL][nv * VL] to dw[k0 + row][tap][c0 ...].
void put(int nv, const float* products, const ConvShape& s, int64_t k0, int64_t tap, int64_t c0, bool add, float* dw) {
  for (int64_t k = k0; k < s.K && k < k0 + VL; ++k)
    for (int n = 0; n < nv; ++n, products += VL) {
      const int64_t c = c0 + n * VL;
      float* out = dw + (k * s.R * s.S + tap) * s.C + c;
      const Vec sum = load(products);
      store_upto(out, add ? load_upto(out, s.C - c) + sum : sum, s.C - c);
    }
}

}  // namespace

void direct_wgrad(const WgradArgs& args) {
  const ConvShape& s = args.shape;
  const Rows rows(s);
  const WgradItems items(s, args.threads);
  // A 1x1 filter meets every stride-th pixel only.
  const int64_t step = s.R == 1 && s.S == 1 ? s.stride : 1, col_step = s.stride / step;
  DirectSource a = {args.x, args.dtype, s.H, s.W, s.C, round_up(s.C, VL), args.prologue, {}, step, -s.pad_left, 0, 0};
  a.cols = (s.Q - 1) * col_step + s.S;
  DirectSource dy = {args.dy, args.dtype, s.P, s.Q, s.K, round_up(s.K, VL), {}, {}, 1, 0, 0, s.Q};

  Parts sizes;
  lay_out(sizes, args, a, dy, rows, items.vectors);
  Parts parts;
  parts.base = static_cast<char*>(scratch_block(sizes.used));
  const Buffers b = lay_out(parts, args, a, dy, rows, items.vectors);
  a.affine = b.affine;
  fill_affine(b.affine, a.prologue, s.C, a.padded);

  const int64_t v_line = a.cols * a.padded, v_row = s.R * v_line;
  const int64_t rows_per_cut = s.Q < kCut ? kCut / s.Q : 1;
#pragma omp parallel num_threads(args.threads)
  {
    const int64_t id = omp_get_thread_num();
    float* products = b.products + id * VL * NR;
    float* row = b.row + id * b.row_floats;
    float* multipliers = b.multipliers + id * b.multipliers_floats;
    for (int64_t begin = 0; begin < rows.count; begin += rows.chunk) {
      const int64_t end = begin + rows.chunk < rows.count ? begin + rows.chunk : rows.count;
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = i / s.P, p = i % s.P;
        for (int64_t r = 0; r < s.R; ++r)
          fill_row(a, image, p * s.stride - s.pad_top + r, b.v + (i - begin) * v_row + r * v_line, multipliers);
        fill_row(dy, image, p, row, nullptr);
        scatter(dy, row, b.d + (i - begin) * s.Q * VL, b.d_vector);
      }
      const WgradWalk walk = {(end - begin) * s.Q, s.Q, rows_per_cut, col_step * a.padded, v_row};
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < items.count; ++i) {
        const int64_t c0 = items.panel(i) * NR;
        const int nv = panel_vectors(s.C, items.panel(i));
        for (int64_t k = items.begin(i); k < items.end(i); ++k)
          for (int64_t tap = 0; tap < s.R * s.S; ++tap) {
            const float* v = b.v + tap / s.S * v_line + tap % s.S * a.padded + c0;
            wgrad_product(nv, b.d + k * b.d_vector, v, walk, products);
            put(nv, products, s, k * VL, tap, c0, begin > 0, args.dw);
          }
      }
    }
  }
}

}  // namespace WRN_ISA
}  // namespace wrn_fast
