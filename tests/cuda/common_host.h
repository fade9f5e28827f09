// The layer of csrc/cuda/common_device.cuh for the CPU: the kernels of common*.cu run here block by block, each part
// between two barriers thread by thread in an order of its own, shared memory and values of threads begin as NaN, and
// an access of 16 bytes to another address than a multiple of 16 is an error. A test tool, no product.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "cuda/common.h"

#define WRN_DEVICE inline

namespace wrn_fast {
namespace cuda {

constexpr int kThreads = 256;

struct Bits128 {
  uint64_t v[2];
};

struct BFloat {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
struct E4M3 {
  uint8_t bits;
};

inline float from_bits(uint32_t bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}
inline uint32_t to_bits(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return bits;
}

inline float widen(float v) {
  return v;
}
inline double widen(double v) {
  return v;
}
inline float widen(BFloat v) {
  return from_bits(static_cast<uint32_t>(v.bits) << 16);
}
inline float widen(Half v) {
  const int exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
  const float size = exponent == 31  ? (fraction ? std::numeric_limits<float>::quiet_NaN() : INFINITY)
                     : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                     : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return v.bits >> 15 ? -size : size;
}

template <class T, class W>
T narrow(W v) {
  if constexpr (std::is_same_v<T, BFloat>) {
    const uint32_t bits = to_bits(static_cast<float>(v));
    if (v != v) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else if constexpr (std::is_same_v<T, Half>) {
    const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
    const double size = std::fabs(static_cast<double>(v));
    if (v != v) return {0x7fff};
    if (size >= 65520.) return {static_cast<uint16_t>(sign | 0x7c00)};
    int exponent = 0;
    std::frexp(size, &exponent);
    const int shift = size > 0. ? std::max(exponent - 11, -24) : -24;  // of the last bit
    const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, -shift)));
    return {static_cast<uint16_t>(sign | ((shift + 24) * 1024 + steps))};
  } else if constexpr (std::is_same_v<T, E4M3>) {
    const uint8_t sign = std::signbit(v) ? 0x80 : 0;
    const double size = std::fabs(static_cast<double>(v));
    if (v != v) return {0x7f};
    if (size >= 448.) return {static_cast<uint8_t>(sign | 0x7e)};
    int exponent = 0;
    std::frexp(size, &exponent);
    const int shift = size > 0. ? std::max(exponent - 4, -9) : -9;  // of the last bit
    const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, -shift)));
    return {static_cast<uint8_t>(sign | ((shift + 9) * 8 + steps))};
  } else {
    return static_cast<T>(v);
  }
}
inline float widen(E4M3 v) {
  const int exponent = v.bits >> 3 & 15, fraction = v.bits & 7;
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -9)
                                   : std::ldexp(static_cast<float>(fraction + 8), exponent - 10);
  if ((v.bits & 0x7f) == 0x7f) return std::numeric_limits<float>::quiet_NaN();
  return v.bits >> 7 ? -size : size;
}

inline void check_alignment(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) throw std::logic_error("16 bytes at an address that is no multiple of 16");
}
inline Bits128 load128(const void* p) {
  check_alignment(p);
  Bits128 bits;
  memcpy(&bits, p, 16);
  return bits;
}
inline void store128(void* p, Bits128 bits) {
  check_alignment(p);
  memcpy(p, &bits, 16);
}

// All bits set is a NaN in every format.
template <class T>
struct PerThread {
  std::unique_ptr<T[]> values{new T[kThreads]};
  PerThread() { memset(static_cast<void*>(values.get()), 0xff, sizeof(T) * kThreads); }
  T& operator[](int thread) { return values[static_cast<size_t>(thread)]; }
};

// Another order at each use.
inline std::vector<int64_t> shuffled(int64_t count) {
  static uint64_t state = 88172645463325252u;
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = order.size(); i > 1; --i) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    std::swap(order[i - 1], order[state % i]);
  }
  return order;
}

struct Block {
  int64_t x;
  int y;

  template <class F>
  void each(F f) const {
    for (const int64_t thread : shuffled(kThreads)) f(static_cast<int>(thread));
  }
};

template <class Kernel>
void launch(int64_t grid_x, int grid_y, const Kernel& kernel, Stream) {
  if (grid_x < 1 || grid_x >= int64_t{1} << 31 || grid_y < 1 || grid_y > 65535) throw Error("invalid configuration");
  using Shared = typename Kernel::Shared;
  for (const int64_t i : shuffled(grid_x * grid_y)) {
    const auto shared = std::make_unique<Shared>();
    memset(static_cast<void*>(shared.get()), 0xff, sizeof(Shared));
    kernel(Block{i / grid_y, static_cast<int>(i % grid_y)}, *shared);
  }
}

}  // namespace cuda
}  // namespace wrn_fast
