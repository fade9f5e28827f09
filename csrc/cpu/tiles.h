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

// Adds the rows of a tile to (mean, m2) of `before` rows. x and the accumulators point at the tile's first channel.
template <class T>
WRN_INLINE void add_moments(const T* x, int64_t stride, int64_t rows, int64_t width, double* mean, double* m2,
                            double before) {
  const Vec count_inverse = broadcast(1.f / static_cast<float>(rows));
  const double n = static_cast<double>(rows);
  for (int64_t c = 0; c < width; c += VL) {
    const int64_t left = smaller(VL, width - c);
    Vec total = zero();
    for (int64_t r = 0; r < rows; ++r) total += load_upto(x + r * stride + c, left);
    const Vec shift = total * count_inverse;
    Vec sum1 = zero(), sum2 = zero();
    for (int64_t r = 0; r < rows; ++r) {
      const Vec d = load_upto(x + r * stride + c, left) - shift;
      sum1 += d;
      sum2 = fma(d, d, sum2);
    }
    float k[VL], s1[VL], s2[VL];
    store(k, shift);
    store(s1, sum1);
    store(s2, sum2);
    double mean_b[VL], m2_b[VL];
    for (int i = 0; i < VL; ++i) {
      const double residue = static_cast<double>(s1[i]) / n;
      mean_b[i] = static_cast<double>(k[i]) + residue;
      m2_b[i] = static_cast<double>(s2[i]) - residue * residue * n;
    }
    merge_moments(mean + c, m2 + c, before, mean_b, m2_b, n, left);
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
