// act' of relu and leaky relu as one bit an element (wrn_fast/masks.py): for a gradient by x alone.
#include "common_rows.cuh"

namespace wrn_fast {
namespace cuda {
namespace {

constexpr int kBits = 8;

// The row and the byte of a mask [rows, bytes] that a thread has.
struct MaskByte {
  int64_t row;
  int byte;

  WRN_DEVICE MaskByte(int64_t index, int bytes) : row(index / bytes), byte(static_cast<int>(index % bytes)) {}
};

// Eight channels from `c` on, 0 past C; V of them at a time.
template <int V, class T, class W>
WRN_DEVICE void load8(const T* row, int c, int C, W (&v)[kBits]) {
#pragma unroll
  for (int i = 0; i < kBits; i += V) {
#pragma unroll
    for (int j = 0; j < V; ++j) v[i + j] = W(0);
    if (c + i >= C) continue;
    const Vector<T, V> in = load<V>(row + c + i);
#pragma unroll
    for (int j = 0; j < V; ++j) v[i + j] = widen(in.v[j]);
  }
}

template <class T, int V>
struct ActMask {
  using W = Wide<T>;
  using Shared = NoShared;

  const T* x;
  const W *stats, *gamma, *beta;
  uint8_t* mask;
  int64_t rows;
  double eps;
  int C, bytes;
  Act act;

  WRN_DEVICE void operator()(const Block& block, Shared&) const {
    block.each([&](int t) {
      const int64_t index = block.x * kThreads + t;
      if (index >= rows * bytes) return;
      const MaskByte at(index, bytes);
      W v[kBits];
      load8<V>(x + at.row * C, at.byte * kBits, C, v);
      unsigned bits = 0;
#pragma unroll
      for (int i = 0; i < kBits; ++i) {
        const int c = at.byte * kBits + i;
        if (c >= C) continue;
        if (stats) {
          const W scale = reciprocal_deviation(stats[C + c], static_cast<W>(eps)) * (gamma ? gamma[c] : W(1));
          v[i] = (v[i] - stats[c]) * scale + (beta ? beta[c] : W(0));
        }
        const bool passes = act == Act::relu ? !(v[i] <= W(0)) : v[i] > W(0);
        bits |= static_cast<unsigned>(passes) << i;
      }
      mask[index] = static_cast<uint8_t>(bits);
    });
  }
};

template <class T, int V, bool kDrop>
struct MaskBackward {
  using W = Wide<T>;
  using Shared = NoShared;

  const T* da;
  const uint8_t* bits;
  const W* scale;
  T* g;
  Mask mask;
  int64_t rows;
  double slope;  // of a closed element
  int C, bytes;

  WRN_DEVICE void operator()(const Block& block, Shared&) const {
    block.each([&](int t) {
      const int64_t index = block.x * kThreads + t;
      if (index >= rows * bytes) return;
      const MaskByte at(index, bytes);
      const int c = at.byte * kBits;
      const unsigned open = bits ? bits[index] : 0xffu;
      W v[kBits];
      load8<V>(da + at.row * C, c, C, v);
#pragma unroll
      for (int i = 0; i < kBits; i += V) {
        if (c + i >= C) continue;
        W part[V];
        Vector<T, V> out;
#pragma unroll
        for (int j = 0; j < V; ++j) part[j] = v[i + j];
        if constexpr (kDrop) Dropped<W>(mask).template drop<V>(part, at.row * C + c + i);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const W passed = open >> (i + j) & 1u ? part[j] : slope == 0. ? W(0) : part[j] * static_cast<W>(slope);
          out.v[j] = narrow<T>(scale ? passed * scale[c + i + j] : passed);
        }
        store(g + at.row * C + c + i, out);
      }
    });
  }
};

template <class F>
void with_vectors(const Rows& shape, const void* a, const void* b, F f) {
  with_type(shape.dtype, [&](auto zero) {
    if (shape.C % kBits == 0 && aligned(a) && aligned(b)) return f(zero, Int<16 / sizeof(decltype(zero))>());
    f(zero, Int<1>());
  });
}

}  // namespace

void act_mask(const Rows& shape, const void* x, const Norm& norm, Act act, void* bits, Stream stream) {
  const int bytes = (shape.C + kBits - 1) / kBits;
  with_vectors(shape, x, x, [&](auto zero, auto vector) {
    using T = decltype(zero);
    using W = Wide<T>;
    launch(ceil_div(shape.rows * bytes, kThreads), 1,
           ActMask<T, decltype(vector)::value>{static_cast<const T*>(x), static_cast<const W*>(norm.stats),
                                               static_cast<const W*>(norm.gamma), static_cast<const W*>(norm.beta),
                                               static_cast<uint8_t*>(bits), shape.rows, norm.eps, shape.C, bytes, act},
           stream);
  });
}

void mask_backward(const Rows& shape, const void* da, const void* bits, const void* scale, double slope,
                   const Mask& mask, void* g, Stream stream) {
  const int bytes = (shape.C + kBits - 1) / kBits;
  with_vectors(shape, da, g, [&](auto zero, auto vector) {
    using T = decltype(zero);
    using W = Wide<T>;
    constexpr int V = decltype(vector)::value;
    const auto start = [&](auto drop) {
      launch(ceil_div(shape.rows * bytes, kThreads), 1,
             MaskBackward<T, V, decltype(drop)::value>{static_cast<const T*>(da), static_cast<const uint8_t*>(bits),
                                                       static_cast<const W*>(scale), static_cast<T*>(g), mask,
                                                       shape.rows, slope, shape.C, bytes},
             stream);
    };
    if (mask.rng) return start(Int<1>());
    start(Int<0>());
  });
}

}  // namespace cuda
}  // namespace wrn_fast
