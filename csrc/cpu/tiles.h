// How a pass walks over [rows, C]: chunks for threads, tiles for the cache, partial sums for determinism.
#pragma once

#include <cstdlib>
#include <new>

#include "vec.h"

namespace wrn_fast {
namespace WRN_ISA {

constexpr int64_t TILE_WIDTH = 256;      // channels
constexpr int64_t TILE_ELEMENTS = 4096;  // 16 KB: a tile stays in the first-level cache for its second sweep
constexpr int64_t CHUNK_ELEMENTS = 32768;
constexpr int64_t MAX_CHUNKS = 64;

WRN_INLINE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
WRN_INLINE int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

// The cut of [rows, C] in chunks of rows: a function of the shape alone.
struct Chunks {
  int64_t rows, count, step;

  Chunks(int64_t rows_, int64_t C) : rows(rows_) {
    const int64_t wanted = larger(1, smaller(MAX_CHUNKS, rows * C / CHUNK_ELEMENTS));
    step = larger(1, (rows + wanted - 1) / wanted);
    count = (rows + step - 1) / step;
  }
  int64_t begin(int64_t i) const { return i * step; }
  int64_t end(int64_t i) const { return smaller(rows, (i + 1) * step); }
};

struct Tile {
  int64_t row, rows, c, width;
};

// f(tile) for the tiles of rows [begin, end), row blocks outermost.
template <class F>
WRN_INLINE void for_tiles(int64_t begin, int64_t end, int64_t C, F f) {
  const int64_t width = smaller(C, TILE_WIDTH), rows = TILE_ELEMENTS / width;
  for (int64_t r = begin; r < end; r += rows)
    for (int64_t c = 0; c < C; c += width) f(Tile{r, smaller(rows, end - r), c, smaller(width, C - c)});
}

// Two doubles a channel and chunk, zeroed.
class Partials {
 public:
  Partials(const Chunks& chunks, int64_t C, bool wanted) : C_(C) {
    if (!wanted) return;
    data_ = static_cast<double*>(calloc(static_cast<size_t>(chunks.count * 2 * C), sizeof(double)));
    if (!data_) throw std::bad_alloc();
  }
  ~Partials() { free(data_); }
  Partials(const Partials&) = delete;
  Partials& operator=(const Partials&) = delete;

  double* first(int64_t chunk) const { return data_ + chunk * 2 * C_; }
  double* second(int64_t chunk) const { return first(chunk) + C_; }

 private:
  int64_t C_;
  double* data_ = nullptr;
};

// (mean, m2) of `before` rows become those of `before + more` rows; mean and m2 [n].
WRN_INLINE void merge_moments(double* mean, double* m2, double before, const double* mean_b, const double* m2_b,
                              double more, int64_t n) {
  const double f = more / (before + more), g = before * f;
  for (int64_t i = 0; i < n; ++i) {
    const double delta = mean_b[i] - mean[i];
    mean[i] += delta * f;
    m2[i] += m2_b[i] + delta * delta * g;
  }
}

// Rows whose sums are taken in fp32 before they merge in double: 178 rows at once left 2.8e-7 in the deviation.
constexpr int64_t MOMENT_ROWS = 16;

// (mean, m2) of `before` rows become those of `before + rows`, for `width` channels in NV vectors.
template <int NV, class T>
WRN_INLINE void add_moments_of(const T* x, int64_t stride, int64_t rows, int64_t width, double* mean, double* m2,
                               double before) {
  const Vec count_inverse = broadcast(1.f / static_cast<float>(rows));
  const double n = static_cast<double>(rows), n_inverse = 1. / n;
  Vec shift[NV], sum1[NV], sum2[NV];
  for (int v = 0; v < NV; ++v) shift[v] = sum1[v] = sum2[v] = zero();
  for (int64_t r = 0; r < rows; ++r)
    for (int v = 0; v < NV; ++v) shift[v] += load_upto(x + r * stride + v * VL, width - v * VL);
  for (int v = 0; v < NV; ++v) shift[v] *= count_inverse;
  for (int64_t r = 0; r < rows; ++r)
    for (int v = 0; v < NV; ++v) {
      const Vec d = load_upto(x + r * stride + v * VL, width - v * VL) - shift[v];
      sum1[v] += d;
      sum2[v] = fma(d, d, sum2[v]);
    }
  float k[NV * VL], s1[NV * VL], s2[NV * VL];
  for (int v = 0; v < NV; ++v) {
    store(k + v * VL, shift[v]);
    store(s1 + v * VL, sum1[v]);
    store(s2 + v * VL, sum2[v]);
  }
  double mean_b[NV * VL], m2_b[NV * VL];
  for (int i = 0; i < NV * VL; ++i) {
    const double residue = static_cast<double>(s1[i]) * n_inverse;
    mean_b[i] = static_cast<double>(k[i]) + residue;
    m2_b[i] = static_cast<double>(s2[i]) - residue * residue * n;
  }
  merge_moments(mean, m2, before, mean_b, m2_b, n, smaller(NV * VL, width));
}

// Adds the rows of a tile to (mean, m2) of `before` rows. x and the accumulators point at the tile's first channel.
template <class T>
WRN_INLINE void add_moments(const T* x, int64_t stride, int64_t rows, int64_t width, double* mean, double* m2,
                            double before) {
  for (int64_t r = 0; r < rows; r += MOMENT_ROWS) {
    const T* first = x + r * stride;
    const int64_t count = smaller(MOMENT_ROWS, rows - r);
    const double above = before + static_cast<double>(r);
    int64_t c = 0;
    for (; c + 4 * VL <= width; c += 4 * VL)
      add_moments_of<4>(first + c, stride, count, 4 * VL, mean + c, m2 + c, above);
    for (; c + 2 * VL <= width; c += 2 * VL)
      add_moments_of<2>(first + c, stride, count, 2 * VL, mean + c, m2 + c, above);
    for (; c < width; c += VL)
      add_moments_of<1>(first + c, stride, count, smaller(VL, width - c), mean + c, m2 + c, above);
  }
}

// Merges all chunks in order into stats [2,C] = mean, biased variance.
static inline __attribute__((unused)) void finish_moments(const Partials& partials, const Chunks& chunks, int64_t C,
                                                          float* stats) {
  double *mean = partials.first(0), *m2 = partials.second(0);
  for (int64_t i = 1; i < chunks.count; ++i)
    merge_moments(mean, m2, static_cast<double>(chunks.begin(i)), partials.first(i), partials.second(i),
                  static_cast<double>(chunks.end(i) - chunks.begin(i)), C);
  for (int64_t c = 0; c < C; ++c) {
    const double var = m2[c] / static_cast<double>(chunks.rows);
    stats[c] = static_cast<float>(mean[c]);
    stats[C + c] = static_cast<float>(var < 0. ? 0. : var);
  }
}

}  // namespace WRN_ISA
}  // namespace wrn_fast
