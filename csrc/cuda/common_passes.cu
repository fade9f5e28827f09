// Passes over rows of channels, bound by memory: each tensor is read or written once, 16 bytes at a time.
#include "common_rows.cuh"

namespace wrn_fast {
namespace cuda {
namespace {

template <class T, int V, bool kDrop>
struct Apply {
  using W = Wide<T>;
  using Shared = NoShared;

  Walk walk;
  const T* x;
  T* y;
  const W *stats, *gamma, *beta;
  Mask mask;
  int64_t rows, block_rows;
  double eps, slope;
  int C;
  Act act;

  WRN_DEVICE void operator()(const Block& block, Shared&) const {
    block.each([&](int t) {
      const Place place(walk, block.y, t);
      if (!place.active) return;
      const int c = place.vector * V;
      const Normalization<V, W> bn(stats, gamma, beta, C, static_cast<W>(eps), c);
      const Dropped<W> dropped(mask);
      const int64_t begin = block.x * block_rows, end = begin + block_rows < rows ? begin + block_rows : rows;
      Vector<T, V> in[kInFlight];
      each_row<kInFlight>(
          walk, place, begin, end, [&](int u, int64_t row) { in[u] = load<V>(x + row * C + c); },
          [&](int u, int64_t row) {
            const int64_t at = row * C + c;
            W v[V];
#pragma unroll
            for (int j = 0; j < V; ++j) {
              v[j] = widen(in[u].v[j]);
              if (stats) v[j] = bn(v[j], j);
              v[j] = activate(v[j], act, static_cast<W>(slope));
            }
            if constexpr (kDrop) dropped.template drop<V>(v, at);
            Vector<T, V> out;
#pragma unroll
            for (int j = 0; j < V; ++j) out.v[j] = narrow<T>(v[j]);
            store(y + at, out);
          });
    });
  }
};

template <class T, int V, bool kSums>
struct BnBackward {
  using W = Wide<T>;
  using Shared = NoShared;

  Walk walk;
  const T *g, *x;
  T* dx;
  const W *stats, *gamma, *sums;
  int64_t rows, block_rows;
  double eps;
  int C;

  WRN_DEVICE void operator()(const Block& block, Shared&) const {
    block.each([&](int t) {
      const Place place(walk, block.y, t);
      if (!place.active) return;
      const int c = place.vector * V;
      W scale[V], mean[V], mean_g[V], of_xhat[V];
      channels(gamma, c, W(1), scale);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const W rstd = reciprocal_deviation(stats[C + c + j], static_cast<W>(eps));
        scale[j] *= rstd;
        if constexpr (kSums) {
          mean[j] = stats[c + j];
          mean_g[j] = sums[c + j] / static_cast<W>(rows);
          of_xhat[j] = sums[C + c + j] / static_cast<W>(rows) * rstd;
        }
      }
      const int64_t begin = block.x * block_rows, end = begin + block_rows < rows ? begin + block_rows : rows;
      Vector<T, V> of_g[kInFlight / 2], of_x[kInFlight / 2];
      each_row<kInFlight / 2>(
          walk, place, begin, end,
          [&](int u, int64_t row) {
            of_g[u] = load<V>(g + row * C + c);
            if constexpr (kSums) of_x[u] = load<V>(x + row * C + c);
          },
          [&](int u, int64_t row) {
            Vector<T, V> out;
#pragma unroll
            for (int j = 0; j < V; ++j) {
              W v = widen(of_g[u].v[j]);
              if constexpr (kSums) v = v - mean_g[j] - (widen(of_x[u].v[j]) - mean[j]) * of_xhat[j];
              out.v[j] = narrow<T>(v * scale[j]);
            }
            store(dx + row * C + c, out);
          });
    });
  }
};

template <class T, int V, bool kDrop>
struct ActBackward {
  using W = Wide<T>;
  using Shared = SumPair<V, W>;

  Walk walk;
  const T *da, *x;
  T* g;
  W* partial;  // [tiles, 2, C]; null: no sums
  const W *stats, *gamma, *beta;
  Mask mask;
  int64_t rows, tile_rows;
  double eps, slope;
  int C;
  Act act;

  WRN_DEVICE void operator()(const Block& block, Shared& s) const {
    block.each([&](int t) {
      const Place place(walk, block.y, t);
      W sum[V] = {}, product[V] = {};
      if (place.active) {
        const int c = place.vector * V;
        const Normalization<V, W> bn(stats, gamma, beta, C, static_cast<W>(eps), c);
        const Dropped<W> dropped(mask);
        const int64_t begin = block.x * tile_rows, end = begin + tile_rows < rows ? begin + tile_rows : rows;
        Vector<T, V> of_da[kInFlight / 2], of_x[kInFlight / 2];
        each_row<kInFlight / 2>(
            walk, place, begin, end,
            [&](int u, int64_t row) {
              of_da[u] = load<V>(da + row * C + c);
              of_x[u] = load<V>(x + row * C + c);
            },
            [&](int u, int64_t row) {
              const int64_t at = row * C + c;
              W v[V];
#pragma unroll
              for (int j = 0; j < V; ++j) v[j] = widen(of_da[u].v[j]);
              if constexpr (kDrop) dropped.template drop<V>(v, at);
              Vector<T, V> out;
#pragma unroll
              for (int j = 0; j < V; ++j) {
                const W value = widen(of_x[u].v[j]);
                out.v[j] = narrow<T>(activate_backward(v[j], bn(value, j), act, static_cast<W>(slope)));
                sum[j] += widen(out.v[j]);
                product[j] += widen(out.v[j]) * (value - bn.mean[j]);
              }
              store(g + at, out);
            });
      }
      s.put(t, sum, product);
    });
    if (!partial) return;
    s.add(block, walk);
    block.each([&](int t) {
      const Place place(walk, block.y, t);
      if (!place.active || place.lane > 0) return;
      // Read again: kept through the rows it would take the registers of others.
      const Normalization<V, W> bn(stats, gamma, beta, C, static_cast<W>(eps), place.vector * V);
      W* to = partial + block.x * 2 * C + static_cast<int64_t>(place.vector) * V;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        to[j] = s.first[j][t];
        to[C + j] = s.second[j][t] * bn.rstd[j];
      }
    });
  }
};

}  // namespace

void apply(const Rows& shape, const void* x, const Norm& norm, Act act, double slope, const Mask& mask, void* y,
           Stream stream) {
  with_type(shape.dtype, [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    const auto start = [&](auto vector, auto drop) {
      constexpr int V = decltype(vector)::value;
      const Walk walk(shape.C / V);
      const int64_t block_rows = block_rows_of(shape, walk);
      launch(ceil_div(shape.rows, block_rows), walk.tiles_y,
             Apply<T, V, decltype(drop)::value>{walk, static_cast<const T*>(x), static_cast<T*>(y),
                                                static_cast<const W*>(norm.stats), static_cast<const W*>(norm.gamma),
                                                static_cast<const W*>(norm.beta), mask, shape.rows, block_rows,
                                                norm.eps, slope, shape.C, act},
             stream);
    };
    const auto choose = [&](auto drop) {
      if (in_vectors(shape, x, y, y)) return start(Int<16 / sizeof(T)>(), drop);
      start(Int<1>(), drop);
    };
    if (mask.rng) return choose(Int<1>());
    choose(Int<0>());
  });
}

void bn_bwd_apply(const Rows& shape, const void* g, const void* x, const Norm& norm, const void* sums, void* dx,
                  Stream stream) {
  with_type(shape.dtype, [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    const auto start = [&](auto vector, auto with_sums) {
      constexpr int V = decltype(vector)::value;
      const Walk walk(shape.C / V);
      const int64_t block_rows = block_rows_of(shape, walk);
      launch(ceil_div(shape.rows, block_rows), walk.tiles_y,
             BnBackward<T, V, decltype(with_sums)::value>{
                 walk, static_cast<const T*>(g), static_cast<const T*>(x), static_cast<T*>(dx),
                 static_cast<const W*>(norm.stats), static_cast<const W*>(norm.gamma), static_cast<const W*>(sums),
                 shape.rows, block_rows, norm.eps, shape.C},
             stream);
    };
    const auto choose = [&](auto with_sums) {
      if (in_vectors(shape, g, x, dx)) return start(Int<16 / sizeof(T)>(), with_sums);
      start(Int<1>(), with_sums);
    };
    if (sums) return choose(Int<1>());
    choose(Int<0>());
  });
}

int64_t act_backward_workspace(const Rows& shape) {
  const int64_t vectors = Tiling(shape, Walk(static_cast<int>(ceil_div(shape.C * size_of(shape.dtype), 16)))).tiles;
  const int64_t single = Tiling(shape, Walk(shape.C)).tiles, tiles = vectors > single ? vectors : single;
  const DType wide = wide_of(shape.dtype);
  return tiles * 2 * shape.C * size_of(wide) + add_slabs_workspace(wide, tiles, 2 * shape.C);
}

void act_backward(const Rows& shape, const void* da, const void* x, const Norm& norm, Act act, double slope,
                  const Mask& mask, void* g, void* sums, void* workspace, Stream stream) {
  with_type(shape.dtype, [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    const auto start = [&](auto vector, auto drop) {
      constexpr int V = decltype(vector)::value;
      const Walk walk(shape.C / V);
      const Tiling tiling(shape, walk);
      W* partial = sums ? static_cast<W*>(workspace) : nullptr;
      launch(tiling.tiles, walk.tiles_y,
             ActBackward<T, V, decltype(drop)::value>{
                 walk, static_cast<const T*>(da), static_cast<const T*>(x), static_cast<T*>(g), partial,
                 static_cast<const W*>(norm.stats), static_cast<const W*>(norm.gamma), static_cast<const W*>(norm.beta),
                 mask, shape.rows, tiling.tile_rows, norm.eps, slope, shape.C, act},
             stream);
      if (!sums) return;
      add_slabs(wide_of(shape.dtype), partial, tiling.tiles, 2 * shape.C, wide_of(shape.dtype), sums,
                partial + tiling.tiles * 2 * shape.C, stream);
    };
    const auto choose = [&](auto drop) {
      if (in_vectors(shape, da, x, g)) return start(Int<16 / sizeof(T)>(), drop);
      start(Int<1>(), drop);
    };
    if (mask.rng) return choose(Int<1>());
    choose(Int<0>());
  });
}

}  // namespace cuda
}  // namespace wrn_fast
