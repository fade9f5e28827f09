// Filter views, and packing with the Winograd transform G w G^T.
#include "filter.h"

#include "winograd_points.h"

namespace wrn_fast {
namespace WRN_ISA {
namespace {

const char* offset(const void* data, DType dtype, int64_t elements) {
  return static_cast<const char*>(data) + elements * (dtype == DType::f32 ? 4 : 2);
}

WRN_INLINE float value(const float* p) {
  return *p;
}
WRN_INLINE float value(const bf16* p) {
  const uint32_t u = static_cast<uint32_t>(p->bits) << 16;
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}

// Reduction rows that are gathered at once, so that every cache line of w is used while it is there.
constexpr int kRows = 8;

// taps[row][r * S + s][lane] of `rows` reduction rows from `reduce` on; lanes past `lanes` are left alone.
template <class T>
WRN_INLINE void gather(const FilterView& f, int64_t first_out, int lanes, int64_t reduce, int rows, float* taps) {
  const T* base = static_cast<const T*>(f.data) + first_out * f.stride_out + reduce * f.stride_reduce;
  const int count = f.R * f.S;
  if (f.stride_out == 1) {
    for (int row = 0; row < rows; ++row)
      for (int tap = 0; tap < count; ++tap) {
        const T* p = base + row * f.stride_reduce + tap / f.S * f.stride_r + tap % f.S * f.stride_s;
        float* t = taps + (row * count + tap) * NR;
        for (int l = 0; l < lanes; ++l) t[l] = value(p + l);
      }
    return;
  }
  for (int l = 0; l < lanes; ++l)
    for (int row = 0; row < rows; ++row) {
      const T* p = base + l * f.stride_out + row * f.stride_reduce;
      float* t = taps + row * count * NR + l;
      for (int r = 0; r < f.R; ++r)
        for (int s = 0; s < f.S; ++s, t += NR) *t = value(p + r * f.stride_r + s * f.stride_s);
    }
}

// v * c, c rounded to twice the digits of fp32: the error is then that of one rounding and no bias of all filters.
WRN_INLINE Vec scaled(const Vec& v, double c) {
  const float high = static_cast<float>(c), low = static_cast<float>(c - static_cast<double>(high));
  return fma(broadcast(high), v, broadcast(low) * v);
}

// Rows of G: the powers of the points, times 1/prod (p_i - p_j).
template <Algo ALGO>
WRN_INLINE void filter_1d(const Vec* g, int sg, Vec* o, int so) {
  const Vec g0 = g[0], g1 = g[sg], g2 = g[2 * sg];
  if constexpr (ALGO == Algo::f2s2) {
    o[0] = g0;
    o[so] = g0 + g2;
    o[2 * so] = g2;
    o[3 * so] = g1;
  } else if constexpr (ALGO == Algo::f4) {
    const Vec a = broadcast(5.f / 8), b = broadcast(3.f / 2);
    const Vec even_a = fma(broadcast(25.f / 64), g2, g0), even_b = fma(broadcast(9.f / 4), g2, g0);
    constexpr double aa = 25. / 64, bb = 9. / 4, scale_a = 1 / (2 * aa * (aa - bb)), scale_b = 1 / (2 * bb * (bb - aa));
    o[0] = scaled(g0, 256. / 225);
    o[so] = scaled(fma(a, g1, even_a), scale_a);
    o[2 * so] = scaled(fnma(a, g1, even_a), scale_a);
    o[3 * so] = scaled(fma(b, g1, even_b), scale_b);
    o[4 * so] = scaled(fnma(b, g1, even_b), scale_b);
    o[5 * so] = g2;
  } else if constexpr (ALGO == Algo::f3) {
    const Vec a = broadcast(3.f / 8), b = broadcast(5.f / 4);
    const Vec even_a = fma(broadcast(9.f / 64), g2, g0), even_b = fma(broadcast(25.f / 16), g2, g0);
    constexpr double aa = 9. / 64, bb = 25. / 16, scale_a = 4 / (3 * (aa - bb)), scale_b = 2 / (5 * (bb - aa));
    o[0] = scaled(fma(a, g1, even_a), scale_a);
    o[so] = scaled(fnma(a, g1, even_a), scale_a);
    o[2 * so] = scaled(fma(b, g1, even_b), scale_b);
    o[3 * so] = scaled(fnma(b, g1, even_b), scale_b);
    o[4 * so] = g2;
  } else {
    const Vec half = broadcast(0.5f), even = half * (g0 + g2), odd = half * g1;
    o[0] = g0;
    o[so] = even + odd;
    o[2 * so] = even - odd;
    o[3 * so] = g2;
  }
}

// taps [9][NR] -> matrices [n squared], matrix_stride apart.
template <Algo ALGO>
void transform(const float* taps, int width, float* out, int64_t matrix_stride) {
  constexpr int n = tile_filters(ALGO);
  for (int l = 0; l < width; l += VL) {
    Vec half[n * 3];
#pragma GCC unroll 3
    for (int s = 0; s < 3; ++s) {
      Vec g[3];
#pragma GCC unroll 3
      for (int r = 0; r < 3; ++r) g[r] = load(taps + (r * 3 + s) * NR + l);
      filter_1d<ALGO>(g, 1, half + s, 3);
    }
#pragma GCC unroll 6
    for (int i = 0; i < n; ++i) {
      Vec o[n];
      filter_1d<ALGO>(half + i * 3, 1, o, 1);
#pragma GCC unroll 6
      for (int j = 0; j < n; ++j) store(out + (i * n + j) * matrix_stride + l, o[j]);
    }
  }
}

// Reduction rows [begin, end) of one panel: matrix x, row c at out[x * matrix_stride + (c - begin) * width].
void pack_rows(Algo algo, const FilterView& f, int64_t panel, int64_t begin, int64_t end, float* out,
               int64_t matrix_stride) {
  const int width = panel_vectors(f.out, panel) * VL, count = f.R * f.S;
  const int64_t first = panel * NR;
  const int lanes = static_cast<int>(f.out - first < width ? f.out - first : width);
  alignas(64) float taps[kRows * kTapsMax * NR];
  if (lanes < width) memset(taps, 0, sizeof taps);
  for (int64_t c = begin; c < end; c += kRows) {
    const int rows = static_cast<int>(end - c < kRows ? end - c : kRows);
    if (f.dtype == DType::f32)
      gather<float>(f, first, lanes, c, rows, taps);
    else
      gather<bf16>(f, first, lanes, c, rows, taps);
    for (int row = 0; row < rows; ++row, out += width) {
      const float* t = taps + row * count * NR;
      if (algo == Algo::f4)
        transform<Algo::f4>(t, width, out, matrix_stride);
      else if (algo == Algo::f3)
        transform<Algo::f3>(t, width, out, matrix_stride);
      else if (algo == Algo::f2)
        transform<Algo::f2>(t, width, out, matrix_stride);
      else if (algo == Algo::f2s2)
        transform<Algo::f2s2>(t, width, out, matrix_stride);
      else
        for (int tap = 0; tap < count; ++tap)
          memcpy(out + tap * matrix_stride, t + tap * NR, sizeof(float) * static_cast<size_t>(width));
    }
  }
}

}  // namespace

FilterView fprop_view(const Weight& w, int64_t K, int64_t C, int R, int S) {
  return {w.data, w.dtype, K, C, R, S, w.stride_k, w.stride_c, w.stride_r, w.stride_s};
}

FilterView dgrad_view(const Weight& w, int64_t K, int64_t C, int R, int S) {
  return {w.data, w.dtype, C, K, R, S, w.stride_c, w.stride_k, w.stride_r, w.stride_s};
}

FilterView rotated_view(const Weight& w, int64_t K, int64_t C, int R, int S) {
  const void* last = offset(w.data, w.dtype, (R - 1) * w.stride_r + (S - 1) * w.stride_s);
  return {last, w.dtype, C, K, R, S, w.stride_c, w.stride_k, -w.stride_r, -w.stride_s};
}

int filter_matrices(Algo algo, const FilterView& f) {
  return algo == Algo::direct ? f.R * f.S : tile_filters(algo) * tile_filters(algo);
}

int64_t filter_floats(Algo algo, const FilterView& f) {
  const int64_t last = panel_count(f.out) - 1;
  return filter_matrices(algo, f) * f.reduce * (last * NR + panel_vectors(f.out, last) * VL);
}

void pack_filter(Algo algo, const FilterView& f, float* out, int threads) {
  const int matrices = filter_matrices(algo, f);
  const int64_t panels = panel_count(f.out);
  // Pieces of 32 rows: even the five panels of K = 160 spread over the threads.
  constexpr int64_t rows = 32;
  const int64_t pieces = (f.reduce + rows - 1) / rows;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t begin = i * rows, end = begin + rows < f.reduce ? begin + rows : f.reduce;
      const int64_t width = panel_vectors(f.out, p) * VL;
      float* panel = out + p * panel_floats(matrices, f.reduce);
      pack_rows(algo, f, p, begin, end, panel + begin * width, f.reduce * width);
    }
}

}  // namespace WRN_ISA
}  // namespace wrn_fast
