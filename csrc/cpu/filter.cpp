// Filter views, and packing with the Winograd transform G w G^T in double, rounded once.
#include "filter.h"

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

// taps[r * S + s][lane] of one reduction row; lanes past `lanes` are zero.
template <class T>
WRN_INLINE void gather(const FilterView& f, int64_t first_out, int lanes, int64_t reduce, float (*taps)[NR]) {
  const T* base = static_cast<const T*>(f.data) + first_out * f.stride_out + reduce * f.stride_reduce;
  for (int r = 0; r < f.R; ++r)
    for (int s = 0; s < f.S; ++s) {
      const T* p = base + r * f.stride_r + s * f.stride_s;
      float* t = taps[r * f.S + s];
      for (int l = 0; l < lanes; ++l) t[l] = value(p + l * f.stride_out);
      for (int l = lanes; l < NR; ++l) t[l] = 0.f;
    }
}

// Rows of G, one lane at a time. Points 0, +-a, +-b, infinity (M = 4) share their even and odd parts.
template <int M, class In>
WRN_INLINE void filter_1d(const In& in, double* o) {
  const double g0 = in(0), g1 = in(1), g2 = in(2);
  if constexpr (M == 4) {
    constexpr double a = 0.625, b = 1.5, na = 2 * a * a * (a * a - b * b), nb = 2 * b * b * (b * b - a * a);
    const double even_a = g0 * (1 / na) + g2 * (a * a / na), odd_a = g1 * (a / na);
    const double even_b = g0 * (1 / nb) + g2 * (b * b / nb), odd_b = g1 * (b / nb);
    o[0] = g0 * (1 / (a * a * b * b));
    o[1] = even_a + odd_a;
    o[2] = even_a - odd_a;
    o[3] = even_b + odd_b;
    o[4] = even_b - odd_b;
    o[5] = g2;
  } else {
    const double even = 0.5 * (g0 + g2), odd = 0.5 * g1;
    o[0] = g0;
    o[1] = even + odd;
    o[2] = even - odd;
    o[3] = g2;
  }
}

template <int M>
void transform(const float (*taps)[NR], int width, float* out, int64_t matrix_stride) {
  constexpr int n = M + 2;
  double half[n][3][NR];
  for (int s = 0; s < 3; ++s)
    for (int l = 0; l < width; ++l) {
      double o[n];
      filter_1d<M>([&](int r) { return static_cast<double>(taps[r * 3 + s][l]); }, o);
      for (int i = 0; i < n; ++i) half[i][s][l] = o[i];
    }
  for (int i = 0; i < n; ++i)
    for (int l = 0; l < width; ++l) {
      double o[n];
      filter_1d<M>([&](int s) { return half[i][s][l]; }, o);
      for (int j = 0; j < n; ++j) out[(i * n + j) * matrix_stride + l] = static_cast<float>(o[j]);
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

int filter_matrices(int m, const FilterView& f) {
  return m ? (m + 2) * (m + 2) : f.R * f.S;
}

int64_t filter_floats(int m, const FilterView& f) {
  const int64_t last = panel_count(f.out) - 1;
  return filter_matrices(m, f) * f.reduce * (last * NR + panel_vectors(f.out, last) * VL);
}

void pack_rows(int m, const FilterView& f, int64_t panel, int64_t begin, int64_t end, float* out,
               int64_t matrix_stride) {
  const int width = panel_vectors(f.out, panel) * VL;
  const int64_t first = panel * NR;
  const int lanes = static_cast<int>(f.out - first < width ? f.out - first : width);
  float taps[kTapsMax][NR];
  for (int64_t c = begin; c < end; ++c, out += width) {
    if (f.dtype == DType::f32)
      gather<float>(f, first, lanes, c, taps);
    else
      gather<bf16>(f, first, lanes, c, taps);
    if (m == 4)
      transform<4>(taps, width, out, matrix_stride);
    else if (m == 2)
      transform<2>(taps, width, out, matrix_stride);
    else
      for (int t = 0; t < f.R * f.S; ++t)
        memcpy(out + t * matrix_stride, taps[t], sizeof(float) * static_cast<size_t>(width));
  }
}

void pack_filter(int m, const FilterView& f, float* out, int threads) {
  const int matrices = filter_matrices(m, f);
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
      pack_rows(m, f, p, begin, end, panel + begin * width, f.reduce * width);
    }
}

}  // namespace WRN_ISA
}  // namespace wrn_fast
