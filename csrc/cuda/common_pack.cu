// Filters as the Hopper kernels read them (sm90.h): cast, tiled and swizzled in one pass.
//
// A block owns one tap of a tile of 64 x 64 channels: it reads it along the filter's own unit stride into shared memory
// and writes 16 bytes a thread. It can leave a tile alone whose samples are what they were when it packed it: then a
// call with an unchanged filter reads 1 % of it, and the host, which never sees the samples, has nothing to wait for.
#include "common_rows.cuh"

namespace wrn_fast {
namespace cuda {
namespace {

constexpr int kTile = 64;           // channels of a swizzled row of 128 bytes
constexpr int kUnit = 8;            // elements of 16 bytes
constexpr int kPadded = kTile + 2;  // spreads a column of the tile over the banks

// Sample q of a tile, one in four rows.
WRN_DEVICE int sample_row(int q) {
  return 4 * q + q % 4;
}
WRN_DEVICE int sample_column(int q) {
  return (q * 23 + 5) % kTile;
}

// NaN equals itself by its bits.
template <class S>
WRN_DEVICE uint32_t bits_of(S v) {
  uint32_t bits = 0;
  memcpy(&bits, &v, sizeof(S));
  return bits;
}

template <class S, class T, int V>
struct PackFilter {
  struct Shared {
    T tile[kTile * kPadded];  // [k][c]
    int stale[kFilterSamples];
    int any;
  };

  const S* w;
  int64_t stride_k, stride_c, stride_r, stride_s;
  int K, C, R, S_;
  bool transpose;
  int out_rows, block_rows;  // rows of the packed filter: K, or C if transposed, and more to pad with zeros
  T* packed;
  S* samples;  // [tiles][taps][kFilterSamples]; null: pack in any case
  bool all;

  WRN_DEVICE const S* at(int k, int c, int tap) const {
    return w + k * stride_k + c * stride_c + tap / S_ * stride_r + tap % S_ * stride_s;
  }

  WRN_DEVICE bool unchanged(const Block& block, Shared& s, int k0, int c0, S* mine) const {
    block.each([&](int t) {
      if (t >= kFilterSamples) return;
      const int k = k0 + sample_row(t), c = c0 + sample_column(t);
      const bool inside = k < K && c < C;
      const S now = inside ? *at(k, c, block.y) : S();
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

  WRN_DEVICE void operator()(const Block& block, Shared& s) const {
    const int tiles_c = (C + kTile - 1) / kTile, tap = block.y;
    const int k0 = static_cast<int>(block.x) / tiles_c * kTile, c0 = static_cast<int>(block.x) % tiles_c * kTile;
    if (samples && unchanged(block, s, k0, c0, samples + (block.x * R * S_ + tap) * kFilterSamples)) return;
    block.each([&](int t) {
#pragma unroll
      for (int n = 0; n < kTile * kTile / V / kThreads; ++n) {
        const int i = n * kThreads + t, row = i / (kTile / V), column = i % (kTile / V) * V;
        Vector<S, V> v = {};
        if (k0 + row < K && c0 + column < C) v = load<V>(at(k0 + row, c0 + column, tap));
#pragma unroll
        for (int j = 0; j < V; ++j) s.tile[row * kPadded + column + j] = narrow<T>(widen(v.v[j]));
      }
    });
    block.each([&](int t) {
      const int rows0 = transpose ? c0 : k0, columns0 = transpose ? k0 : c0;
      const int chunks = ((transpose ? K : C) + kTile - 1) / kTile;
#pragma unroll
      for (int n = 0; n < kTile * kTile / kUnit / kThreads; ++n) {
        const int i = n * kThreads + t, row = i / (kTile / kUnit), unit = i % (kTile / kUnit), k = rows0 + row;
        if (k >= out_rows) continue;
        Vector<T, kUnit> v;
#pragma unroll
        for (int j = 0; j < kUnit; ++j) {
          const int column = unit * kUnit + j;
          v.v[j] = transpose ? s.tile[column * kPadded + row] : s.tile[row * kPadded + column];
        }
        // [k / block_rows][chunk][s][r][k % block_rows][unit ^ k % 8]
        const int64_t chunk = static_cast<int64_t>(k / block_rows) * chunks + columns0 / kTile;
        const int64_t image = (chunk * S_ + tap % S_) * R + tap / S_;
        store(packed + (image * block_rows + k % block_rows) * kTile + (unit ^ (k % kUnit)) * kUnit, v);
      }
    });
  }
};

}  // namespace

int64_t pack_samples_bytes(const Weight& w, int K, int C, int R, int S) {
  return ceil_div(K, kTile) * ceil_div(C, kTile) * R * S * kFilterSamples * size_of(w.dtype);
}

void pack_filter(const Weight& w, int K, int C, int R, int S, bool transpose, int out_rows, int block_rows, DType dtype,
                 void* packed, void* samples, bool all, Stream stream) {
  const auto start = [&](auto source, auto target) {
    using From = decltype(source);
    using To = decltype(target);
    const int64_t grid = ceil_div(K, kTile) * ceil_div(C, kTile);
    const From* from = static_cast<const From*>(w.data);
    constexpr int kVector = static_cast<int>(16 / sizeof(From));
    const auto kernel = [&](auto vector) {
      launch(grid, R * S,
             PackFilter<From, To, decltype(vector)::value>{from, w.stride_k, w.stride_c, w.stride_r, w.stride_s, K, C,
                                                           R, S, transpose, out_rows, block_rows,
                                                           static_cast<To*>(packed), static_cast<From*>(samples), all},
             stream);
    };
    if (w.stride_c == 1 && C % kVector == 0 && aligned(from)) return kernel(Int<kVector>());
    kernel(Int<1>());
  };
  const auto to = [&](auto source) {
    if (dtype == DType::bf16) return start(source, BFloat());
    start(source, Half());
  };
  if (w.dtype == DType::f32) return to(float());
  if (w.dtype == DType::bf16) return start(BFloat(), BFloat());
  start(Half(), Half());
}

}  // namespace cuda
}  // namespace wrn_fast
