// Operands in e4m3: activations after BatchNorm, activation and dropout, and what the rows of a filter are divided by.
#include "common_rows.cuh"

namespace wrn_fast {
namespace cuda {
namespace {

constexpr float kLargest = 448.f;

// 16 channels a thread: two loads of 16 bytes, one store.
template <class T, bool kDrop>
struct Quantize {
  static constexpr int kHalf = 16 / sizeof(T), V = 2 * kHalf;
  static constexpr int kRows = kDrop ? 1 : 2;  // in flight: a mask takes the registers
  using Shared = NoShared;

  Walk walk;
  const T* x;
  E4M3* y;
  const float *stats, *gamma, *beta, *amax;
  Mask mask;
  int64_t rows, block_rows;
  float eps, slope;
  int C;
  Act act;

  WRN_DEVICE void operator()(const Block& block, Shared&) const {
    block.each([&](int t) {
      const Place place(walk, block.y, t);
      if (!place.active) return;
      const int c = place.vector * V;
      const Normalization<V, float> bn(stats, gamma, beta, C, eps, c);
      const Dropped<float> dropped(mask);
      const float unit = kLargest / *amax;
      const int64_t begin = block.x * block_rows, end = begin + block_rows < rows ? begin + block_rows : rows;
      Vector<T, kHalf> in[kRows][2];
      each_row<kRows>(
          walk, place, begin, end,
          [&](int u, int64_t row) {
            in[u][0] = load<kHalf>(x + row * C + c);
            in[u][1] = load<kHalf>(x + row * C + c + kHalf);
          },
          [&](int u, int64_t row) {
            float v[V];
#pragma unroll
            for (int j = 0; j < V; ++j) {
              v[j] = widen(in[u][j / kHalf].v[j % kHalf]);
              if (stats) v[j] = bn(v[j], j);
              v[j] = activate(v[j], act, slope);
            }
            if constexpr (kDrop) dropped.template drop<V>(v, row * C + c);
            Vector<E4M3, V> out;
#pragma unroll
            for (int j = 0; j < V; ++j) out.v[j] = narrow<E4M3>(v[j] * unit);
            store(y + row * C + c, out);
          });
    });
  }
};

// A block a row of the filter, which lies dense in memory in any order.
template <class S, int V>
struct FilterScales {
  struct Shared {
    float most[kThreads];
  };

  const S* w;
  int64_t stride, length;
  const float* amax;
  float *scale, *factor;

  WRN_DEVICE void operator()(const Block& block, Shared& s) const {
    block.each([&](int t) {
      const S* const row = w + block.x * stride;
      float most = 0.f;
      for (int64_t i = static_cast<int64_t>(t) * V; i < length; i += kThreads * V) {
        const Vector<S, V> v = load<V>(row + i);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const float size = widen(v.v[j]) < 0.f ? -widen(v.v[j]) : widen(v.v[j]);
          most = size > most ? size : most;
        }
      }
      s.most[t] = most;
    });
    for (int half = kThreads / 2; half > 0; half /= 2) {
      block.each([&](int t) {
        if (t < half && s.most[t + half] > s.most[t]) s.most[t] = s.most[t + half];
      });
    }
    block.each([&](int t) {
      if (t > 0) return;
      // A row of zeros, or of numbers that would make the scale 0, is divided by 1.
      const float of_row = s.most[0] * (1.f / kLargest) > 0.f ? s.most[0] / kLargest : 1.f;
      scale[block.x] = of_row;
      factor[block.x] = of_row * (*amax / kLargest);
    });
  }
};

}  // namespace

void quantize(const Rows& shape, const void* x, const Norm& norm, Act act, double slope, const Mask& mask,
              const float* amax, void* y, Stream stream) {
  const auto start = [&](auto zero, auto drop) {
    using T = decltype(zero);
    const Walk walk(shape.C / 16);
    const int64_t block_rows = block_rows_of(shape, walk);
    launch(ceil_div(shape.rows, block_rows), walk.tiles_y,
           Quantize<T, decltype(drop)::value>{
               walk, static_cast<const T*>(x), static_cast<E4M3*>(y), static_cast<const float*>(norm.stats),
               static_cast<const float*>(norm.gamma), static_cast<const float*>(norm.beta), amax, mask, shape.rows,
               block_rows, static_cast<float>(norm.eps), static_cast<float>(slope), shape.C, act},
           stream);
  };
  const auto choose = [&](auto zero) { mask.rng ? start(zero, Int<1>()) : start(zero, Int<0>()); };
  shape.dtype == DType::bf16 ? choose(BFloat()) : choose(Half());
}

void filter_scales(const Filter& f, const float* amax, float* scale, float* factor, Stream stream) {
  with_type(f.w.dtype, [&](auto zero) {
    using S = decltype(zero);
    if constexpr (sizeof(S) < 8) {
      const S* const w = static_cast<const S*>(f.w.data);
      const int64_t length = static_cast<int64_t>(f.C) * f.R * f.S;
      constexpr int V = 16 / sizeof(S);
      if (aligned(w) && length % V == 0 && f.w.stride_k % V == 0) {
        launch(f.K, 1, FilterScales<S, V>{w, f.w.stride_k, length, amax, scale, factor}, stream);
      } else {
        launch(f.K, 1, FilterScales<S, 1>{w, f.w.stride_k, length, amax, scale, factor}, stream);
      }
    }
  });
}

}  // namespace cuda
}  // namespace wrn_fast
