// The gradient of the head's mean over the image, through activation and BatchNorm: what its two passes over y are.
//
//   g = dfeat[n, c] / pixels * act'(bn(y))   dy = gamma * rstd * (g - sum(g)/m - xhat * sum(g * xhat)/m)
//
// g is made twice and stored nowhere. Sums have one order, which depends on shapes only.
#include "common_rows.cuh"

namespace wrn_fast {
namespace cuda {
namespace {

// What both passes know of a vector of channels.
template <class T, int V>
struct GradientOfImage {
  using W = Wide<T>;

  const W* dfeat;
  const T* y;
  const W *stats, *gamma, *beta;
  uint32_t pixels;
  double eps, slope;
  int C;
  Act act;

  WRN_DEVICE Normalization<V, W> channels_from(int c) const { return {stats, gamma, beta, C, static_cast<W>(eps), c}; }

  // g of pixel `row` of all, and y - mean.
  WRN_DEVICE void make(const Normalization<V, W>& bn, const Vector<T, V>& v, int64_t row, int c, W (&g)[V],
                       W (&centered)[V]) const {
    const W* const of_image = dfeat + static_cast<int64_t>(static_cast<uint32_t>(row) / pixels) * C + c;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      centered[j] = widen(v.v[j]) - bn.mean[j];
      g[j] = activate_backward(of_image[j] / static_cast<W>(pixels), bn(widen(v.v[j]), j), act, static_cast<W>(slope));
    }
  }
};

template <class T, int V>
struct HeadSums {
  using W = Wide<T>;
  using Shared = SumPair<V, W>;

  Walk walk;
  GradientOfImage<T, V> gradient;
  W* partial;  // [tiles, 2, C]
  int64_t rows, tile_rows;

  WRN_DEVICE void operator()(const Block& block, Shared& s) const {
    const int C = gradient.C;
    block.each([&](int t) {
      const Place place(walk, block.y, t);
      W sum[V] = {}, product[V] = {};
      if (place.active) {
        const int c = place.vector * V;
        const auto bn = gradient.channels_from(c);
        const int64_t begin = block.x * tile_rows, end = begin + tile_rows < rows ? begin + tile_rows : rows;
        Vector<T, V> in[kInFlight / 2];
        each_row<kInFlight / 2>(
            walk, place, begin, end, [&](int u, int64_t row) { in[u] = load<V>(gradient.y + row * C + c); },
            [&](int u, int64_t row) {
              W g[V], centered[V];
              gradient.make(bn, in[u], row, c, g, centered);
#pragma unroll
              for (int j = 0; j < V; ++j) {
                sum[j] += g[j];
                product[j] += g[j] * (centered[j] * bn.rstd[j]);
              }
            });
      }
      s.put(t, sum, product);
    });
    s.add(block, walk);
    block.each([&](int t) {
      const Place place(walk, block.y, t);
      if (!place.active || place.lane > 0) return;
      W* const to = partial + block.x * 2 * C + static_cast<int64_t>(place.vector) * V;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        to[j] = s.first[j][t];
        to[C + j] = s.second[j][t];
      }
    });
  }
};

template <class T, int V>
struct HeadGradient {
  using W = Wide<T>;
  using Shared = NoShared;

  Walk walk;
  GradientOfImage<T, V> gradient;
  const W* sums;  // null: not of the batch
  T* dy;
  int64_t rows, block_rows;

  WRN_DEVICE void operator()(const Block& block, Shared&) const {
    const int C = gradient.C;
    block.each([&](int t) {
      const Place place(walk, block.y, t);
      if (!place.active) return;
      const int c = place.vector * V;
      const auto bn = gradient.channels_from(c);
      W mean_g[V] = {}, of_centered[V] = {};
      if (sums) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
          mean_g[j] = sums[c + j] / static_cast<W>(rows);
          of_centered[j] = sums[C + c + j] / static_cast<W>(rows) * bn.rstd[j];
        }
      }
      const int64_t begin = block.x * block_rows, end = begin + block_rows < rows ? begin + block_rows : rows;
      Vector<T, V> in[kInFlight / 2];
      each_row<kInFlight / 2>(
          walk, place, begin, end, [&](int u, int64_t row) { in[u] = load<V>(gradient.y + row * C + c); },
          [&](int u, int64_t row) {
            W g[V], centered[V];
            gradient.make(bn, in[u], row, c, g, centered);
            Vector<T, V> out;
#pragma unroll
            for (int j = 0; j < V; ++j) {
              const W v = sums ? g[j] - mean_g[j] - centered[j] * of_centered[j] : g[j];
              out.v[j] = narrow<T>(v * bn.scale[j]);
            }
            store(dy + row * C + c, out);
          });
    });
  }
};

}  // namespace

int64_t head_bwd_workspace(DType dtype, int64_t N, int pixels, int C) {
  // The same two sums of each channel.
  return act_backward_workspace({dtype, N * pixels, C});
}

void head_bwd(const HeadBackward& h, Stream stream) {
  with_type(h.dtype, [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    const Rows shape{h.dtype, h.N * h.pixels, h.C};
    const auto start = [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      const Walk walk(h.C / V);
      const GradientOfImage<T, V> gradient{static_cast<const W*>(h.dfeat),
                                           static_cast<const T*>(h.y),
                                           static_cast<const W*>(h.norm.stats),
                                           static_cast<const W*>(h.norm.gamma),
                                           static_cast<const W*>(h.norm.beta),
                                           static_cast<uint32_t>(h.pixels),
                                           h.norm.eps,
                                           h.slope,
                                           h.C,
                                           h.act};
      if (h.sums) {
        const Tiling tiling(shape, walk);
        W* const partial = static_cast<W*>(h.workspace);
        launch(tiling.tiles, walk.tiles_y, HeadSums<T, V>{walk, gradient, partial, shape.rows, tiling.tile_rows},
               stream);
        add_slabs(wide_of(h.dtype), partial, tiling.tiles, 2 * h.C, wide_of(h.dtype), h.sums,
                  partial + tiling.tiles * 2 * h.C, stream);
      }
      const int64_t block_rows = block_rows_of(shape, walk);
      launch(ceil_div(shape.rows, block_rows), walk.tiles_y,
             HeadGradient<T, V>{walk, gradient, h.batch ? static_cast<const W*>(h.sums) : nullptr,
                                static_cast<T*>(h.dy), shape.rows, block_rows},
             stream);
    };
    if (in_vectors(shape, h.y, h.dy, h.dy) && aligned(h.dfeat)) return start(Int<16 / sizeof(T)>());
    start(Int<1>());
  });
}

}  // namespace cuda
}  // namespace wrn_fast
