// How a block walks over rows of channels, and the arithmetic on 16 bytes of them: widening, activation, dropout.
#pragma once

#include "common_device.cuh"
#include "common_philox.h"

namespace wrn_fast {
namespace cuda {

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class T>
using Wide = typename WideOf<T>::type;

// V elements in memory: 16 bytes, or one element where C or a pointer does not allow 16.
template <class T, int V>
struct Vector {
  static_assert(V == 1 || V * sizeof(T) == 16, "a vector is one element or 16 bytes");
  T v[V];
};

template <int V, class T>
WRN_DEVICE Vector<T, V> load(const T* p) {
  Vector<T, V> r;
  if constexpr (V == 1) {
    r.v[0] = *p;
  } else {
    const Bits128 bits = load128(p);
    memcpy(&r, &bits, 16);
  }
  return r;
}

template <class T, int V>
WRN_DEVICE void store(T* p, const Vector<T, V>& r) {
  if constexpr (V == 1) {
    *p = r.v[0];
  } else {
    Bits128 bits;
    memcpy(&bits, &r, 16);
    store128(p, bits);
  }
}

// A block is `lanes` rows of `columns` vectors; neighbours in a row are neighbours in memory. Blocks of the y direction
// share the vectors of a row where these are more than the threads of a block.
struct Walk {
  int vectors;  // of a row
  int columns, lanes, tiles_y;

  explicit Walk(int vectors_)
      : vectors(vectors_),
        columns((vectors_ + tiles_of(vectors_) - 1) / tiles_of(vectors_)),
        lanes(kThreads / columns),
        tiles_y(tiles_of(vectors_)) {}

  static int tiles_of(int vectors) { return (vectors + kThreads - 1) / kThreads; }
};

// Where a thread of a Walk stands.
struct Place {
  int column, lane, vector;
  bool active;

  WRN_DEVICE Place(const Walk& walk, int y, int thread)
      : column(thread % walk.columns),
        lane(thread / walk.columns),
        vector(y * walk.columns + column),
        active(lane < walk.lanes && vector < walk.vectors) {}
};

constexpr int kInFlight = 4;  // vectors that a thread loads before it uses the first

// Walks the rows of a block kRows at a time: load(u, row) of all, then use(u, row) of all.
template <int kRows, class Load, class Use>
WRN_DEVICE void each_row(const Walk& walk, const Place& place, int64_t begin, int64_t end, Load load, Use use) {
  for (int64_t row = begin + place.lane; row < end; row += static_cast<int64_t>(walk.lanes) * kRows) {
#pragma unroll
    for (int u = 0; u < kRows; ++u)
      if (row + u * walk.lanes < end) load(u, row + u * walk.lanes);
#pragma unroll
    for (int u = 0; u < kRows; ++u)
      if (row + u * walk.lanes < end) use(u, row + u * walk.lanes);
  }
}

struct NoShared {};

constexpr int kChunk = 8;
constexpr int64_t kMostTiles = 64 * 64;

// How kernels with sums cut their rows: a tile is a block's, whole chunks of kChunk rows a lane.
struct Tiling {
  int64_t tile_rows, tiles;

  Tiling(const Rows& shape, const Walk& walk) {
    const int64_t chunk = static_cast<int64_t>(walk.lanes) * kChunk, chunks = ceil_div(shape.rows, chunk);
    tile_rows = ceil_div(chunks, kMostTiles) * chunk;
    tiles = ceil_div(shape.rows, tile_rows);
  }
};

// Adds acc[j][lane * columns + column] over the lanes; the sums are then in lane 0.
template <int V, class W>
WRN_DEVICE void add_lanes(const Block& block, int columns, int lanes, W (&acc)[V][kThreads]) {
  int half = 1;
  while (2 * half < lanes) half *= 2;
  if (lanes == 1) half = 0;
  for (; half > 0; half /= 2) {
    block.each([&](int t) {
      const int lane = t / columns;
      if (lane < half && lane + half < lanes) {
#pragma unroll
        for (int j = 0; j < V; ++j) acc[j][t] += acc[j][t + half * columns];
      }
    });
  }
}

// Two sums of each channel, over the lanes of a block.
template <int V, class W>
struct SumPair {
  W first[V][kThreads], second[V][kThreads];

  WRN_DEVICE void put(int t, const W (&a)[V], const W (&b)[V]) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      first[j][t] = a[j];
      second[j][t] = b[j];
    }
  }
  // The sums are then in lane 0.
  WRN_DEVICE void add(const Block& block, const Walk& walk) {
    add_lanes(block, walk.columns, walk.lanes, first);
    add_lanes(block, walk.columns, walk.lanes, second);
  }
};

template <class W>
WRN_DEVICE W reciprocal_deviation(W variance, W eps) {
  return W(1) / sqrt(variance + eps);
}

// The C entries of a vector from `c` on; `missing` where there is none.
template <int V, class W>
WRN_DEVICE void channels(const W* from, int c, W missing, W (&to)[V]) {
#pragma unroll
  for (int j = 0; j < V; ++j) to[j] = from ? from[c + j] : missing;
}

// BatchNorm of the V channels from `c` on: bn(v) = (v - mean) * scale + shift. Without statistics mean is 0 and rstd 1.
template <int V, class W>
struct Normalization {
  W mean[V], scale[V], shift[V], rstd[V];

  WRN_DEVICE Normalization(const W* stats, const W* gamma, const W* beta, int C, W eps, int c) {
    channels(stats, c, W(0), mean);
    channels(gamma, c, W(1), scale);
    channels(beta, c, W(0), shift);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      rstd[j] = stats ? reciprocal_deviation(stats[C + c + j], eps) : W(1);
      scale[j] *= rstd[j];
    }
  }

  WRN_DEVICE W operator()(W v, int j) const { return (v - mean[j]) * scale[j] + shift[j]; }
};

// Entry i of a vector of any dtype.
template <class W>
WRN_DEVICE W number(const void* from, DType dtype, int i) {
  switch (dtype) {
    case DType::f32:
      return static_cast<W>(static_cast<const float*>(from)[i]);
    case DType::bf16:
      return static_cast<W>(widen(static_cast<const BFloat*>(from)[i]));
    case DType::f16:
      return static_cast<W>(widen(static_cast<const Half*>(from)[i]));
    default:
      return static_cast<W>(static_cast<const double*>(from)[i]);
  }
}

// act(v). NaN stays NaN.
template <class W>
WRN_DEVICE W activate(W v, Act act, W slope) {
  switch (act) {
    case Act::relu:
      return v < W(0) ? W(0) : v;
    case Act::silu:
      return v / (W(1) + exp(-v));
    case Act::leaky_relu:
      return v > W(0) ? v : v * slope;
    default:
      return v;
  }
}

// g * act'(v), as PyTorch has it: a selection, 0 at 0 for relu, `slope` at 0 for leaky_relu.
template <class W>
WRN_DEVICE W activate_backward(W g, W v, Act act, W slope) {
  switch (act) {
    case Act::relu:
      return v <= W(0) ? W(0) : g;
    case Act::silu: {
      const W s = W(1) / (W(1) + exp(-v));
      return g * (s * (W(1) + v * (W(1) - s)));
    }
    case Act::leaky_relu:
      return v > W(0) ? g : g * slope;
    default:
      return g;
  }
}

// A Mask with its seed read, and `scale` in the wide dtype.
template <class W>
struct Dropped {
  uint64_t seed, offset;
  uint32_t threshold;
  W scale;

  WRN_DEVICE explicit Dropped(const Mask& d)
      : seed(d.rng ? static_cast<uint64_t>(d.rng[0]) : 0),
        offset(d.rng ? static_cast<uint64_t>(d.rng[1]) : 0),
        threshold(d.threshold),
        scale(static_cast<W>(d.scale)) {}

  // v [V] are the elements from `index` on, a multiple of V. A product, so that a dropped NaN stays NaN.
  template <int V>
  WRN_DEVICE void drop(W (&v)[V], int64_t index) const {
#pragma unroll
    for (int j = 0; j < V; j += 4) {
      const PhiloxWords words = philox(static_cast<uint64_t>(index + j) >> 2, seed, offset);
#pragma unroll
      for (int i = 0; i < 4 && i < V; ++i) {
        const int k = V >= 4 ? i : static_cast<int>(index & 3) + i;
        const uint32_t word = k == 0 ? words.w[0] : k == 1 ? words.w[1] : k == 2 ? words.w[2] : words.w[3];
        v[j + i] *= word >= threshold ? scale : W(0);
      }
    }
  }
};

// A number as a type, to choose a kernel by.
template <int N>
struct Int {
  static constexpr int value = N;
};

// Calls f with a value of the element type of `dtype`.
template <class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f(float());
    case DType::f16:
      return f(Half());
    case DType::bf16:
      return f(BFloat());
    default:
      return f(double());
  }
}

// The same for the dtype of statistics: float, or double.
template <class F>
void with_wide(DType wide, F f) {
  if (wide == DType::f64) return f(double());
  f(float());
}

inline bool aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

constexpr int64_t kBlocks = 2048;  // beyond these a block takes more rows, and makes its channels' vectors once for all

// Rows of a block: a few loads a thread, more where the grid is full anyway.
inline int64_t block_rows_of(const Rows& shape, const Walk& walk) {
  const int64_t least = static_cast<int64_t>(walk.lanes) * kInFlight;
  const int64_t times = shape.rows / (least * kBlocks);
  return least * (times < 1 ? 1 : times > 16 ? 16 : times);
}

inline bool in_vectors(const Rows& shape, const void* a, const void* b, const void* c) {
  return shape.C * size_of(shape.dtype) % 16 == 0 && aligned(a) && aligned(b) && aligned(c);
}

}  // namespace cuda
}  // namespace wrn_fast
