// Filters as the Hopper kernels read them (sm90.h): cast, tiled and swizzled in one pass, all of a model in one launch.
//
// A block owns one tap of a tile of 64 x 64 channels: it reads it along the filter's own unit stride into shared memory
// and writes 16 bytes a thread. It can leave a tile alone whose samples are what they were when it packed it: then a
// call with an unchanged filter reads 1 % of it, and the host, which never sees the samples, has nothing to wait for.
#include <algorithm>

#include "common_rows.cuh"

namespace wrn_fast {
namespace cuda {
namespace {

constexpr int kTile = 64;           // channels of a block's tile
constexpr int kPadded = kTile + 2;  // spreads a column of the tile over the banks

// Sample q of a tile of which `rows` x `columns` lie in the filter, one in four rows where all do.
WRN_DEVICE int sample_row(int q, int rows) {
  return (4 * q + q % 4) * rows / kTile;
}
WRN_DEVICE int sample_column(int q, int columns) {
  return (q * 23 + 5) % kTile * columns / kTile;
}

// NaN equals itself by its bits.
template <class S>
WRN_DEVICE uint32_t bits_of(S v) {
  uint32_t bits = 0;
  memcpy(&bits, &v, sizeof(S));
  return bits;
}

// A filter and the number of its first block.
struct FilterBlocks : Filter {
  int64_t first;
  bool vectors;  // 16 bytes at a time
};

// A value of row k as it is packed.
template <class T>
WRN_DEVICE T rounded(const Filter&, int, float v) {
  return narrow<T>(v);
}
template <>
WRN_DEVICE E4M3 rounded<E4M3>(const Filter& f, int k, float v) {
  return narrow<E4M3>(k < f.K ? v / f.scale[k] : 0.f);
}

template <class T>
struct PackFilters {
  static constexpr int kUnit = 16 / sizeof(T);  // elements of 16 bytes
  static constexpr int kRow = 128 / sizeof(T);  // and of a swizzled row
  struct Shared {
    T tile[kTile * kPadded];  // [k][c]
    int stale[kFilterSamples];
    int any;
  };

  FilterBlocks filters[kMostFilters];
  int count;
  bool all;

  // A row has whole chunks, so that what lies past the last channel becomes zero.
  WRN_DEVICE static int tiles_of(int C) { return (C + kRow - 1) / kRow * (kRow / kTile); }

  template <class S>
  WRN_DEVICE static const S* at(const Filter& f, int k, int c, int tap) {
    return static_cast<const S*>(f.w.data) + k * f.w.stride_k + c * f.w.stride_c + tap / f.S * f.w.stride_r +
           tap % f.S * f.w.stride_s;
  }

  template <class S>
  WRN_DEVICE bool unchanged(const Block& block, Shared& s, const Filter& f, int k0, int c0, int tap, S* mine) const {
    block.each([&](int t) {
      if (t >= kFilterSamples) return;
      const int rows = f.K - k0 < kTile ? f.K - k0 : kTile, columns = f.C - c0 < kTile ? f.C - c0 : kTile;
      const S now = *at<S>(f, k0 + sample_row(t, rows), c0 + sample_column(t, columns), tap);
      s.stale[t] = all || bits_of(now) != bits_of(mine[t]);
      if (s.stale[t]) mine[t] = now;
    });
    block.each([&](int t) {
      if (t > 0) return;
      s.any = 0;
      for (int q = 0; q < kFilterSamples; ++q) s.any |= s.stale[q];
    });
    return !s.any;
  }

  template <class S, int V>
  WRN_DEVICE void pack(const Block& block, Shared& s, const Filter& f, int64_t number) const {
    const int taps = f.R * f.S, tiles_c = tiles_of(f.C), tap = static_cast<int>(number % taps);
    const int tile = static_cast<int>(number / taps), k0 = tile / tiles_c * kTile, c0 = tile % tiles_c * kTile;
    S* const samples = static_cast<S*>(f.samples);
    if (samples && unchanged<S>(block, s, f, k0, c0, tap, samples + number * kFilterSamples)) return;
    block.each([&](int t) {
#pragma unroll
      for (int n = 0; n < kTile * kTile / V / kThreads; ++n) {
        const int i = n * kThreads + t, row = i / (kTile / V), column = i % (kTile / V) * V;
        Vector<S, V> v = {};
        if (k0 + row < f.K && c0 + column < f.C) v = load<V>(at<S>(f, k0 + row, c0 + column, tap));
#pragma unroll
        for (int j = 0; j < V; ++j) s.tile[row * kPadded + column + j] = rounded<T>(f, k0 + row, widen(v.v[j]));
      }
    });
    block.each([&](int t) {
      const int rows0 = f.transpose ? c0 : k0, columns0 = f.transpose ? k0 : c0;
      const int chunks = ((f.transpose ? f.K : f.C) + kRow - 1) / kRow;
#pragma unroll
      for (int n = 0; n < kTile * kTile / kUnit / kThreads; ++n) {
        const int i = n * kThreads + t, row = i / (kTile / kUnit), unit = i % (kTile / kUnit), k = rows0 + row;
        if (k >= f.out_rows) continue;
        Vector<T, kUnit> v;
#pragma unroll
        for (int j = 0; j < kUnit; ++j) {
          const int column = unit * kUnit + j;
          v.v[j] = f.transpose ? s.tile[column * kPadded + row] : s.tile[row * kPadded + column];
        }
        // [k / block_rows][chunk][s][r][k % block_rows][unit of the chunk ^ k % 8]
        const int64_t chunk = static_cast<int64_t>(k / f.block_rows) * chunks + columns0 / kRow;
        const int64_t image = (chunk * f.S + tap % f.S) * f.R + tap / f.S;
        const int place = (columns0 % kRow / kUnit + unit) ^ (k % 8);
        store(static_cast<T*>(f.packed) + (image * f.block_rows + k % f.block_rows) * kRow + place * kUnit, v);
      }
    });
  }

  WRN_DEVICE void operator()(const Block& block, Shared& s) const {
    int i = 0;
    while (i + 1 < count && filters[i + 1].first <= block.x) ++i;
    const FilterBlocks& f = filters[i];
    const int64_t number = block.x - f.first;
    if (f.w.dtype == DType::f32) return from<float>(block, s, f, number);
    if constexpr (sizeof(T) > 1) return from<T>(block, s, f, number);
    f.w.dtype == DType::bf16 ? from<BFloat>(block, s, f, number) : from<Half>(block, s, f, number);
  }

  template <class S>
  WRN_DEVICE void from(const Block& block, Shared& s, const Filter& f, int64_t number) const {
    static_cast<const FilterBlocks&>(f).vectors ? pack<S, 16 / sizeof(S)>(block, s, f, number)
                                                : pack<S, 1>(block, s, f, number);
  }
};

}  // namespace

int64_t pack_samples_bytes(const Weight& w, int K, int C, int R, int S) {
  return ceil_div(K, kTile) * ceil_div(C, kTile) * R * S * kFilterSamples * size_of(w.dtype);
}

template <class T>
static void pack_as(const Filter* filters, int count, bool all, Stream stream) {
  PackFilters<T> kernel{};
  kernel.all = all;
  for (int done = 0; done < count; done += kernel.count) {
    int64_t blocks = 0;
    kernel.count = std::min(kMostFilters, count - done);
    for (int i = 0; i < kernel.count; ++i) {
      FilterBlocks& f = kernel.filters[i];
      static_cast<Filter&>(f) = filters[done + i];
      f.first = blocks;
      f.vectors = f.w.stride_c == 1 && f.C * size_of(f.w.dtype) % 16 == 0 && aligned(f.w.data);
      blocks += ceil_div(f.K, kTile) * (ceil_div(f.C, PackFilters<T>::kRow) * PackFilters<T>::kRow / kTile) * f.R * f.S;
    }
    launch(blocks, 1, kernel, stream);
  }
}

void pack_filters(const Filter* filters, int count, DType dtype, bool all, Stream stream) {
  dtype == DType::bf16 ? pack_as<BFloat>(filters, count, all, stream) : pack_as<Half>(filters, count, all, stream);
}

void pack_filter_e4m3(const Filter& filter, Stream stream) {
  pack_as<E4M3>(&filter, 1, true, stream);
}

}  // namespace cuda
}  // namespace wrn_fast
