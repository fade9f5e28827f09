// Per-channel statistics without atomics: every sum has one order, which depends on shapes only.
//
// A tile leaves (pivot, offset, M2) a channel: the rounded mean of its rows, what rounding cut off it, and the squared
// distances from the two together. Merging takes kGroup tiles at a time, in index order, and only ever subtracts
// pivots, so a channel with mean 1000 and variance 1 keeps its digits (Chan, Golub, LeVeque: Algorithms for Computing
// the Sample Variance, The American Statistician 37, 1983).
#include "common_rows.cuh"

namespace wrn_fast {
namespace cuda {
namespace {

constexpr int kRowsInFlight = kChunk;  // vectors that a thread loads before it uses the first
constexpr int kGroup = 64;             // tiles that one block merges
constexpr int kMergeColumns = 32;
constexpr int kMergeLanes = kThreads / kMergeColumns;
static_assert(kMostTiles == kGroup * kGroup, "two merges are enough");

template <class T, int V>
struct ChannelStats {
  using W = Wide<T>;
  using Shared = SumPair<V, W>;
  // The channels of a thread of lane 0, over the chunks so far.
  struct Running {
    W pivot[V], offset[V], m2[V];
  };

  Walk walk;
  const T* x;
  W *counts, *values;  // [tiles], [tiles, 3, C]
  int64_t rows, tile_rows;
  int C;

  WRN_DEVICE void operator()(const Block& block, Shared& s) const {
    PerThread<Running> running;
    PerThread<Vector<T, V>[kRowsInFlight]> loaded;
    PerThread<W[V]> pivot;
    const int64_t begin = block.x * tile_rows, end = begin + tile_rows < rows ? begin + tile_rows : rows;
    const int chunk_rows = walk.lanes * kRowsInFlight;
    for (int64_t chunk = begin; chunk < end; chunk += chunk_rows) {
      const W count = static_cast<W>(end - chunk < chunk_rows ? end - chunk : chunk_rows);
      const W before = static_cast<W>(chunk - begin);
      block.each([&](int t) {
        const Place place(walk, block.y, t);
        const T* from = x + (chunk + place.lane) * C + static_cast<int64_t>(place.vector) * V;
        const int64_t left = end - chunk - place.lane;
        W sum[V] = {};
#pragma unroll
        for (int u = 0; u < kRowsInFlight; ++u) {
          if (place.active && u * walk.lanes < left)
            loaded[t][u] = load<V>(from + static_cast<int64_t>(u) * walk.lanes * C);
        }
#pragma unroll
        for (int u = 0; u < kRowsInFlight; ++u) {
          if (place.active && u * walk.lanes < left) {
#pragma unroll
            for (int j = 0; j < V; ++j) sum[j] += widen(loaded[t][u].v[j]);
          }
        }
#pragma unroll
        for (int j = 0; j < V; ++j) s.first[j][t] = sum[j];
      });
      add_lanes(block, walk.columns, walk.lanes, s.first);
      block.each([&](int t) {
        const int column = t % walk.columns;
#pragma unroll
        for (int j = 0; j < V; ++j) pivot[t][j] = s.first[j][column] / count;
      });
      block.each([&](int t) {
        const Place place(walk, block.y, t);
        const int64_t left = end - chunk - place.lane;
        W sum[V] = {}, squares[V] = {};
#pragma unroll
        for (int u = 0; u < kRowsInFlight; ++u) {
          if (place.active && u * walk.lanes < left) {
#pragma unroll
            for (int j = 0; j < V; ++j) {
              const W d = widen(loaded[t][u].v[j]) - pivot[t][j];
              sum[j] += d;
              squares[j] += d * d;
            }
          }
        }
        s.put(t, sum, squares);
      });
      s.add(block, walk);
      block.each([&](int t) {
        const Place place(walk, block.y, t);
        if (!place.active || place.lane > 0) return;
        Running& r = running[t];
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const W offset = s.first[j][t] / count, m2 = s.second[j][t] - count * offset * offset;
          if (chunk == begin) {
            r.pivot[j] = pivot[t][j];
            r.offset[j] = offset;
            r.m2[j] = m2;
          } else {
            const W delta = pivot[t][j] - r.pivot[j] + (offset - r.offset[j]), total = before + count;
            r.offset[j] += delta * (count / total);
            r.m2[j] += m2 + delta * delta * (before * count / total);
          }
        }
      });
    }
    block.each([&](int t) {
      const Place place(walk, block.y, t);
      if (!place.active || place.lane > 0) return;
      W* to = values + block.x * 3 * C + static_cast<int64_t>(place.vector) * V;
      if (place.vector == 0) counts[block.x] = static_cast<W>(end - begin);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        to[j] = running[t].pivot[j];
        to[C + j] = running[t].offset[j];
        to[2 * C + j] = running[t].m2[j];
      }
    });
  }
};

// What a merge reads of a part: (pivot, offset, M2) of kPlanes = 3, (mean, M2) of kPlanes = 2.
template <class W, int kPlanes>
struct Parts {
  const W *counts, *values;  // [parts], [parts, kPlanes, C]
  int64_t count;
  int C;

  WRN_DEVICE W pivot(int64_t part, int c) const { return values[part * kPlanes * C + c]; }
  WRN_DEVICE W offset(int64_t part, int c) const { return kPlanes == 3 ? values[(part * kPlanes + 1) * C + c] : W(0); }
  WRN_DEVICE W m2(int64_t part, int c) const { return values[(part * kPlanes + kPlanes - 1) * C + c]; }
};

// A group of kGroup parts into one part of three planes; the last group of all into stats [2, C].
template <class W, int kPlanes>
struct Merge {
  using Shared = SumPair<1, W>;

  Parts<W, kPlanes> parts;
  W *counts, *values, *stats;

  WRN_DEVICE void operator()(const Block& block, Shared& s) const {
    const int C = parts.C;
    const int64_t begin = block.x * kGroup, end = begin + kGroup < parts.count ? begin + kGroup : parts.count;
    PerThread<W> start, count, mean;
    block.each([&](int t) {
      const int c = block.y * kMergeColumns + t % kMergeColumns;
      W sum = 0, rows = 0;
      if (c < C) {
        start[t] = parts.pivot(begin, c);
        for (int64_t part = begin + t / kMergeColumns; part < end; part += kMergeLanes) {
          sum += (parts.pivot(part, c) - start[t] + parts.offset(part, c)) * parts.counts[part];
          rows += parts.counts[part];
        }
      }
      s.first[0][t] = sum;
      s.second[0][t] = rows;
    });
    add_lanes(block, kMergeColumns, kMergeLanes, s.first);
    add_lanes(block, kMergeColumns, kMergeLanes, s.second);
    block.each([&](int t) {
      count[t] = s.second[0][t % kMergeColumns];
      mean[t] = count[t] > W(0) ? s.first[0][t % kMergeColumns] / count[t] : W(0);
    });
    block.each([&](int t) {
      const int c = block.y * kMergeColumns + t % kMergeColumns;
      W sum = 0;
      if (c < C) {
        for (int64_t part = begin + t / kMergeColumns; part < end; part += kMergeLanes) {
          const W d = parts.pivot(part, c) - start[t] + parts.offset(part, c) - mean[t];
          sum += parts.m2(part, c) + d * d * parts.counts[part];
        }
      }
      s.first[0][t] = sum;
    });
    add_lanes(block, kMergeColumns, kMergeLanes, s.first);
    block.each([&](int t) {
      const int c = block.y * kMergeColumns + t;
      if (t >= kMergeColumns || c >= C) return;
      if (stats) {
        stats[c] = start[t] + mean[t];
        stats[C + c] = s.first[0][t] / count[t];
        return;
      }
      W* to = values + block.x * 3 * C + c;
      to[0] = start[t];
      to[C] = mean[t];
      to[2 * C] = s.first[0][t];
      if (c == 0) counts[block.x] = count[t];
    });
  }
};

// out[group][i] = the sum of slabs[group * per_group ...][i], in index order.
template <class W, class T, int V>
struct AddSlabs {
  struct Shared {};

  const W* slabs;
  T* out;
  int64_t slabs_count, per_group, count;

  WRN_DEVICE void operator()(const Block& block, Shared&) const {
    block.each([&](int t) {
      const int64_t i = (block.x * kThreads + t) * V;
      if (i >= count) return;
      const int64_t begin = block.y * per_group;
      const int64_t end = begin + per_group < slabs_count ? begin + per_group : slabs_count;
      W sum[V] = {};
#pragma unroll 4
      for (int64_t slab = begin; slab < end; ++slab) {
        const Vector<W, V> v = load<V>(slabs + slab * count + i);
#pragma unroll
        for (int j = 0; j < V; ++j) sum[j] += v.v[j];
      }
#pragma unroll
      for (int j = 0; j < V; ++j) out[block.y * count + i + j] = narrow<T>(sum[j]);
    });
  }
};

template <class W, class T>
void add_slabs_of(const void* slabs, int64_t slabs_count, int64_t per_group, int64_t count, void* out, Stream stream) {
  constexpr int V = 16 / sizeof(W);
  const int groups = static_cast<int>(ceil_div(slabs_count, per_group));
  const W* from = static_cast<const W*>(slabs);
  T* to = static_cast<T*>(out);
  if (count % V == 0 && aligned(slabs)) {
    launch(ceil_div(count, kThreads * V), groups, AddSlabs<W, T, V>{from, to, slabs_count, per_group, count}, stream);
  } else {
    launch(ceil_div(count, kThreads), groups, AddSlabs<W, T, 1>{from, to, slabs_count, per_group, count}, stream);
  }
}

// A slab of wgrad is as large as a filter; those of sums are a few channels, so many must be added at once.
bool many_small(int64_t slabs, int64_t count) {
  return slabs > kGroup && count <= 64 * 1024;
}

// Bytes of what merges leave behind before the last one, for so many parts of three planes.
int64_t merged_values(int64_t parts, int C) {
  int64_t groups = 0;
  for (int64_t left = ceil_div(parts, kGroup); left > 1; left = ceil_div(left, kGroup)) groups += left;
  return groups * (3 * C + 1);
}

template <class W, int kPlanes>
void merge(Parts<W, kPlanes> parts, W* stats, W* workspace, Stream stream) {
  const int64_t groups = ceil_div(parts.count, kGroup);
  const int grid_y = static_cast<int>(ceil_div(parts.C, kMergeColumns));
  if (groups == 1) return launch(1, grid_y, Merge<W, kPlanes>{parts, nullptr, nullptr, stats}, stream);
  W *counts = workspace, *values = workspace + groups;
  launch(groups, grid_y, Merge<W, kPlanes>{parts, counts, values, nullptr}, stream);
  merge(Parts<W, 3>{counts, values, groups, parts.C}, stats, values + groups * 3 * parts.C, stream);
}

}  // namespace

int64_t channel_stats_workspace(const Rows& shape) {
  // Single elements make the smaller chunks, hence the more tiles.
  const int64_t vectors = Tiling(shape, Walk(static_cast<int>(ceil_div(shape.C * size_of(shape.dtype), 16)))).tiles;
  const int64_t single = Tiling(shape, Walk(shape.C)).tiles, tiles = vectors > single ? vectors : single;
  return (tiles * (3 * shape.C + 1) + merged_values(tiles, shape.C)) * size_of(wide_of(shape.dtype));
}

void channel_stats(const Rows& shape, const void* x, void* stats, void* workspace, Stream stream) {
  with_type(shape.dtype, [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    const auto start = [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      const Walk walk(shape.C / V);
      const Tiling tiling(shape, walk);
      W *counts = static_cast<W*>(workspace), *values = counts + tiling.tiles;
      launch(tiling.tiles, walk.tiles_y,
             ChannelStats<T, V>{walk, static_cast<const T*>(x), counts, values, shape.rows, tiling.tile_rows, shape.C},
             stream);
      merge(Parts<W, 3>{counts, values, tiling.tiles, shape.C}, static_cast<W*>(stats),
            values + tiling.tiles * 3 * shape.C, stream);
    };
    if (shape.C * size_of(shape.dtype) % 16 == 0 && aligned(x)) return start(Int<16 / sizeof(T)>());
    start(Int<1>());
  });
}

int64_t merge_moments_workspace(DType wide, int64_t parts, int C) {
  return merged_values(parts, C) * size_of(wide);
}

void merge_moments(DType wide, int C, const void* counts, const void* moments, int64_t parts, void* stats,
                   void* workspace, Stream stream) {
  with_wide(wide, [&](auto zero) {
    using W = decltype(zero);
    merge(Parts<W, 2>{static_cast<const W*>(counts), static_cast<const W*>(moments), parts, C}, static_cast<W*>(stats),
          static_cast<W*>(workspace), stream);
  });
}

int64_t add_slabs_workspace(DType wide, int64_t slabs, int64_t count) {
  int64_t groups = 0;
  for (; many_small(slabs, count); slabs = ceil_div(slabs, kGroup)) groups += ceil_div(slabs, kGroup);
  return groups * count * size_of(wide);
}

void add_slabs(DType wide, const void* from, int64_t slabs, int64_t count, DType dtype, void* out, void* workspace,
               Stream stream) {
  with_wide(wide, [&](auto zero) {
    using W = decltype(zero);
    const void* left = from;
    W* to = static_cast<W*>(workspace);
    int64_t left_slabs = slabs;
    while (many_small(left_slabs, count)) {
      const int64_t groups = ceil_div(left_slabs, kGroup);
      add_slabs_of<W, W>(left, left_slabs, kGroup, count, to, stream);
      left = to;
      to += groups * count;
      left_slabs = groups;
    }
    with_type(dtype, [&](auto element) {
      add_slabs_of<W, decltype(element)>(left, left_slabs, left_slabs, count, out, stream);
    });
  });
}

}  // namespace cuda
}  // namespace wrn_fast
