// Input transform of a strip: prologue, zero halo, B^T d B.
//
// Vertical transforms run once a column of the strip and are shared by the tiles that overlap there; the horizontal
// ones follow tile by tile (0.82 ms against 1.17 tile by tile: 8 x 160@32, one Zen 4 core).
#include "act.h"
#include "philox.h"
#include "winograd.h"
#include "winograd_points.h"

namespace wrn_fast {
namespace WRN_ISA {
namespace {

int64_t strip_columns(Algo algo, const WinogradInput& in) {
  return in.tile_cols * tile_step(algo) + tile_products(algo) - tile_step(algo);
}

// One block of VL channels of the strip: rows[i] points at (row i, column 0) or is null outside the image.
template <class T>
struct Block {
  const T* rows[6];
  int64_t pixel;                // step between columns, elements
  const float* multipliers[6];  // dropout, same layout as x; null when there is none
  int64_t multiplier_pixel;
};

template <Algo ALGO, class T, bool AFFINE, Act act, bool ALL_ROWS>
WRN_INLINE void vertical(const WinogradInput& in, const Block<T>& block, int64_t c, int64_t width, float* columns) {
  constexpr int n = tile_products(ALGO);
  const Vec center = AFFINE ? load(in.affine.center + c) : zero();
  const Vec scale = AFFINE ? load(in.affine.scale + c) : zero();
  const Vec shift = AFFINE ? load(in.affine.shift + c) : zero();
  const Vec slope = broadcast(in.prologue.slope);
  const bool drop = in.prologue.dropout.active;
  for (int64_t w = 0; w < width; ++w) {
    Vec d[n], o[n];
#pragma GCC unroll 6
    for (int i = 0; i < n; ++i) {
      d[i] = zero();
      if (ALL_ROWS || block.rows[i]) {
        Vec v = load(block.rows[i] + w * block.pixel);
        if (AFFINE) v = activate<act>(fma(v - center, scale, shift), slope);
        if (drop) v *= load(block.multipliers[i] + w * block.multiplier_pixel);
        d[i] = v;
      }
    }
    input_1d<ALGO>(d, 1, o, 1);
#pragma GCC unroll 6
    for (int i = 0; i < n; ++i) store(columns + (w * n + i) * VL, o[i]);
  }
}

template <Algo ALGO>
WRN_INLINE void horizontal(const float* columns, int64_t tiles, float* v, int64_t plane, int64_t tile) {
  constexpr int n = tile_products(ALGO);
  for (int64_t t = 0; t < tiles; ++t) {
    const float* column = columns + t * tile_step(ALGO) * n * VL;
#pragma GCC unroll 6
    for (int i = 0; i < n; ++i) {
      Vec d[n], o[n];
#pragma GCC unroll 6
      for (int j = 0; j < n; ++j) d[j] = load(column + (j * n + i) * VL);
      input_1d<ALGO>(d, 1, o, 1);
#pragma GCC unroll 6
      for (int j = 0; j < n; ++j) store(v + (i * n + j) * plane + t * tile, o[j]);
    }
  }
}

template <Algo ALGO, class T, bool AFFINE, Act act>
void strip(const WinogradInput& in, int64_t image, int64_t tile_row, int64_t c0, int64_t c1, float* v, int64_t plane,
           float* scratch) {
  constexpr int n = tile_products(ALGO);
  const int64_t top = tile_row * tile_step(ALGO) - in.pad_top, columns = strip_columns(ALGO, in);
  // At stride 2 the last pixels of a row may be out of reach.
  const int64_t reached = in.pad_left + in.W < columns ? in.W : columns - in.pad_left;
  float* column = scratch;
  float* multipliers = column + columns * n * VL;
  // Columns outside the image stay zero for every block of channels.
  for (int64_t w = 0; w < in.pad_left * n * VL; w += VL) store(column + w, zero());
  for (int64_t w = (in.pad_left + reached) * n * VL; w < columns * n * VL; w += VL) store(column + w, zero());

  const T* rows[n];
  const int64_t row_elements = in.W * in.C;
  const int64_t multiplier_row = row_elements + VL, width = (c1 < in.C ? c1 : in.C) - c0;
  bool all_rows = true;
  for (int i = 0; i < n; ++i) {
    const int64_t h = top + i;
    const bool inside = h >= 0 && h < in.H;
    all_rows &= inside;
    const int64_t first = (image * in.H + h) * row_elements;
    rows[i] = inside ? static_cast<const T*>(in.data) + first : nullptr;
    if (!inside || !in.prologue.dropout.active) continue;
    float* row = multipliers + i * multiplier_row;
    if (width == in.C) {
      dropout_multipliers(row, first, row_elements, in.prologue.dropout);
      continue;
    }
    for (int64_t w = 0; w < in.W; ++w)
      dropout_multipliers(row + w * width, first + w * in.C + c0, width, in.prologue.dropout);
  }
  T* tail = reinterpret_cast<T*>(multipliers + (in.prologue.dropout.active ? n * multiplier_row : 0));

  for (int64_t c = c0; c < c1; c += VL) {
    Block<T> block;
    const int64_t left = in.C - c;
    block.pixel = left >= VL ? in.C : VL;
    block.multiplier_pixel = width;
    for (int i = 0; i < n; ++i) {
      block.multipliers[i] = multipliers + i * multiplier_row + c - c0;
      block.rows[i] = rows[i] ? rows[i] + c : nullptr;
      if (left < VL && rows[i]) {
        // The last channels are copied next to zeros, so that whole vectors can be read.
        T* copy = tail + i * in.W * VL;
        for (int64_t w = 0; w < in.W; ++w)
          for (int64_t l = 0; l < VL; ++l) copy[w * VL + l] = l < left ? rows[i][w * in.C + c + l] : T();
        block.rows[i] = copy;
      }
    }
    float* inner = column + in.pad_left * n * VL;
    if (all_rows)
      vertical<ALGO, T, AFFINE, act, true>(in, block, c, reached, inner);
    else
      vertical<ALGO, T, AFFINE, act, false>(in, block, c, reached, inner);
    horizontal<ALGO>(column, in.tile_cols, v + c, plane, in.padded);
  }
}

template <Algo ALGO, class T>
InputTransform strip_for(const WinogradInput& in) {
  switch (in.prologue.act) {
    case Act::relu:
      return strip<ALGO, T, true, Act::relu>;
    case Act::leaky_relu:
      return strip<ALGO, T, true, Act::leaky_relu>;
    case Act::silu:
      return strip<ALGO, T, true, Act::silu>;
    default:
      return in.affine.center ? strip<ALGO, T, true, Act::identity> : strip<ALGO, T, false, Act::identity>;
  }
}

}  // namespace

InputTransform input_transform(Algo algo, const WinogradInput& in) {
  const bool wide = in.dtype == DType::f32;
  if (algo == Algo::f2s2) return wide ? strip_for<Algo::f2s2, float>(in) : strip_for<Algo::f2s2, bf16>(in);
  if (algo == Algo::f2) return wide ? strip_for<Algo::f2, float>(in) : strip_for<Algo::f2, bf16>(in);
  if (algo == Algo::f3) return wide ? strip_for<Algo::f3, float>(in) : strip_for<Algo::f3, bf16>(in);
  return wide ? strip_for<Algo::f4, float>(in) : strip_for<Algo::f4, bf16>(in);
}

int64_t input_scratch_floats(Algo algo, const WinogradInput& in) {
  const int64_t n = tile_products(algo);
  int64_t floats = strip_columns(algo, in) * n * VL;
  if (in.prologue.dropout.active) floats += n * (in.W * in.C + VL);
  if (in.C % VL) floats += n * in.W * VL;
  return floats;
}

}  // namespace WRN_ISA
}  // namespace wrn_fast
