// The computations of sm90_index.h that only the weight gradient has.
#pragma once

#include "sm90_index.h"

namespace wrn_fast {
namespace sm90 {

// wgrad: three consumers, each 64 channels at one filter position, over 128 pixels a stage. A unit is (channel chunk,
// filter row); consumer i of group g has unit 3 g + i. With halo the three rows of one chunk share a fetch.
constexpr int kWgradConsumers = 3, kWgradThreads = (1 + kWgradConsumers) * kWarpgroup, kWgradRowsLog = 7;

struct WgradGrid {
  int chunks = 1, R = 1, S = 1, k_blocks = 1, splits = 1;
};
struct WgradJob {
  int group = 0, s = 0, k_block = 0, split = 0;
};
SM90_HD int wgrad_groups(const WgradGrid& g) {
  return static_cast<int>(ceil_div(g.chunks * g.R, kWgradConsumers));
}
SM90_HD int wgrad_jobs(const WgradGrid& g) {
  return wgrad_groups(g) * g.S * g.k_blocks * g.splits;
}
SM90_HD WgradJob wgrad_job(const WgradGrid& g, int job) {
  const int groups = wgrad_groups(g), rest = job / groups;
  return {job % groups, rest % g.S, rest / g.S % g.k_blocks, rest / (g.S * g.k_blocks)};
}
SM90_HD int unit_chunk(const WgradGrid& g, int group, int consumer) {
  return (group * kWgradConsumers + consumer) / g.R;
}
SM90_HD int unit_row(const WgradGrid& g, int group, int consumer) {
  return (group * kWgradConsumers + consumer) % g.R;
}
SM90_HD int units_in(const WgradGrid& g, int group) {
  return least(kWgradConsumers, g.chunks * g.R - group * kWgradConsumers);
}
// As many splits of the pixels as fill the multiprocessors once: each costs a slab written and read.
SM90_HD int wgrad_splits(const WgradGrid& one, int pixel_tiles, int multiprocessors) {
  return most(1, least(pixel_tiles, multiprocessors / wgrad_jobs(one)));
}
// Both operands are MN-major: a row is a pixel. a: 64 channels a row; the next 8 pixels are a kilobyte on.
SM90_HD uint64_t wgrad_a_descriptor(uint32_t start) {
  return descriptor(start, 0, 8 * kRowBytes, Swizzle::b128);
}
// dy: planes of plane_channels() channels, 128 pixels each.
SM90_HD uint64_t wgrad_dy_descriptor(int block_k, uint32_t start) {
  const uint32_t row = plane_channels(block_k) * 2;
  return descriptor(start, (1u << kWgradRowsLog) * row, 8 * row, plane_swizzle(block_k));
}
SM90_HD uint32_t wgrad_dy_step(int block_k) {
  return 16 * plane_channels(block_k) * 2;
}

template <int block_k, bool halo>
struct WgradMemory {
  static constexpr int kHalo = halo ? 2 : 0;
  static constexpr int kABytes = (halo ? 160 : kWgradConsumers * 128) * kRowBytes;
  static constexpr int kDyBytes = 128 * block_k * 2;
  static constexpr int kBarrierBytes = 256;
  static constexpr int kStages = least(6, (kSharedMax - kBarrierBytes) / (kABytes + kDyBytes));
  static constexpr uint32_t kBytes = kStages * (kABytes + kDyBytes) + kBarrierBytes;
  // `consumer`: without halo each has its own fetch.
  static SM90_HD uint32_t a(int stage, int consumer) {
    return static_cast<uint32_t>(stage * (kABytes + kDyBytes) + (halo ? 0 : consumer * 128 * kRowBytes));
  }
  static SM90_HD uint32_t dy(int stage) { return static_cast<uint32_t>(stage * (kABytes + kDyBytes) + kABytes); }
  static SM90_HD uint32_t full(int stage) { return static_cast<uint32_t>(kStages * (kABytes + kDyBytes) + stage * 16); }
  static SM90_HD uint32_t empty(int stage) { return full(stage) + 8; }
  static_assert(kStages >= 2 && kStages * 16 <= kBarrierBytes && kABytes % 1024 == 0 && kDyBytes % 1024 == 0);
};

}  // namespace sm90
}  // namespace wrn_fast
