// Gradient of a convolution by its filter on Hopper. Not run on a GPU yet.
//
//   dw[k, r, s, c] = sum over pixels of dy[pixel, k] * a[pixel's tap (r, s), c]
//
// A block has one filter column, block_k filters and three units of (64 channels, filter row), one a consumer
// warpgroup; it walks through every splits-th tile of 128 pixels. Both operands have the pixels as rows, so both are
// MN-major, and one fetch of dy serves the three units. A split writes its own slab; the slabs are added in their
// order.
#pragma once

#include "sm90_hw.cuh"
#include "sm90_plan.h"

namespace wrn_fast {
namespace sm90 {

template <int block_k_, bool halo_, bool fp16_>
struct WgradTraits {
  static constexpr int block_k = block_k_;
  static constexpr bool halo = halo_, fp16 = fp16_;
  using Memory = WgradMemory<block_k, halo>;
  static constexpr int kConsumerRegisters = 152, kProducerRegisters = 56;
  static_assert((kWgradConsumers * kConsumerRegisters + kProducerRegisters) * kWarpgroup <= 128 * kWgradThreads);
};

template <class T, class Params>
SM90_FN void wgrad_produce(const Params& p, uint32_t base) {
  using M = typename T::Memory;
  const WgradJob job = wgrad_job(p.grid, hw::block());
  const PixelTile tile = p.schedule.tile;
  const int units = units_in(p.grid, job.group), tiles = pixel_tiles(p.schedule);
  const uint32_t bytes = fetched_rows(tile, M::kHalo) * kRowBytes * (T::halo ? 1 : units) + M::kDyBytes;
  Ring ring;
  for (int i = job.split; i < tiles; i += p.grid.splits) {
    const Pixel o = job_of(p.schedule, i).origin;
    const uint32_t full = base + M::full(ring.index);
    hw::barrier_wait(base + M::empty(ring.index), ring.phase ^ 1);
    hw::barrier_expect(full, bytes);
    hw::load_box5(base + M::dy(ring.index), &p.dy, full, 0, o.q, o.p, o.n,
                  job.k_block * (T::block_k / plane_channels(T::block_k)));
    for (int u = 0; u < (T::halo ? 1 : units); ++u) {
      hw::load_box4(base + M::a(ring.index, u), &p.a, full, unit_chunk(p.grid, job.group, u) * kChunk,
                    o.q * p.in_stride + job.s - p.pad_left,
                    o.p * p.in_stride + unit_row(p.grid, job.group, u) - p.pad_top, o.n);
    }
    ring = next(ring, M::kStages);
  }
}

template <class T, class Params>
SM90_FN void wgrad_consume(const Params& p, uint32_t base, int consumer) {
  using M = typename T::Memory;
  const WgradJob job = wgrad_job(p.grid, hw::block());
  const PixelTile tile = p.schedule.tile;
  const bool elected = hw::thread() % kWarpgroup == 0;
  const int row = unit_row(p.grid, job.group, consumer), tiles = pixel_tiles(p.schedule);
  float acc[T::block_k / 2];
#pragma unroll
  for (int i = 0; i < T::block_k / 2; ++i) acc[i] = 0.f;
  Ring ring;
  // The stage of the batch before the running one; -1: none. Not known to the compiler, which would peel a batch.
  int done = hw::fresh(-1);
  for (int i = job.split; i < tiles; i += p.grid.splits) {
    hw::barrier_wait(base + M::full(ring.index), ring.phase);
    hw::pin(acc);
    hw::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const uint32_t start = base + M::a(ring.index, consumer) + a_start(tile, M::kHalo, 16 * k, T::halo ? row : 0);
      hw::wgmma<T::block_k, T::fp16, true>(
          acc, wgrad_a_descriptor(start),
          wgrad_dy_descriptor(T::block_k, base + M::dy(ring.index) + k * wgrad_dy_step(T::block_k)));
    }
    hw::wgmma_commit();
    hw::pin(acc);
    hw::wgmma_wait<1>();
    if (elected && done >= 0) hw::barrier_arrive(base + M::empty(done));
    done = ring.index;
    ring = next(ring, M::kStages);
  }
  hw::wgmma_wait<0>();
  hw::pin(acc);
  if (elected && done >= 0) hw::barrier_arrive(base + M::empty(done));

  const int t = hw::thread() % kWarpgroup, chunk = unit_chunk(p.grid, job.group, consumer);
  const int64_t taps = static_cast<int64_t>(p.grid.R) * p.grid.S;
  float* const slab = p.slabs + job.split * (p.K * taps * p.channels) + (row * p.grid.S + job.s) * p.channels;
#pragma unroll
  for (int i = 0; i < T::block_k / 2; ++i) {
    const int c = chunk * kChunk + acc_row(t / 32, t % 32, i), k = job.k_block * T::block_k + acc_column(t % 32, i);
    if (c < p.channels) slab[k * taps * p.channels + c] = acc[i];
  }
}

template <class T, class Params>
SM90_FN void wgrad_body(const Params& p) {
  using M = typename T::Memory;
  const uint32_t base = hw::shared_base();
  const int warp = hw::warp_uniform(hw::thread() / 32);
  const int units = units_in(p.grid, wgrad_job(p.grid, hw::block()).group);
  if (hw::thread() == 0) {
    for (int i = 0; i < M::kStages; ++i) {
      hw::barrier_init(base + M::full(i), 1);
      hw::barrier_init(base + M::empty(i), units);
    }
    hw::barrier_init_fence();
    hw::prefetch_map(&p.a);
    hw::prefetch_map(&p.dy);
  }
  hw::sync_block();
  hw::wait_for_prior_grid();
  const int group = warp / (kWarpgroup / 32);
  if (group == 0) {
    hw::registers_down<T::kProducerRegisters>();
    if (hw::thread() == 0) wgrad_produce<T>(p, base);
  } else {
    hw::registers_up<T::kConsumerRegisters>();
    if (group <= units) wgrad_consume<T>(p, base, group - 1);
  }
}

// Element i of dw: the slabs in their order.
SM90_FN float sum_slabs(const float* slabs, int splits, int64_t size, int64_t i) {
  float sum = slabs[i];
  for (int s = 1; s < splits; ++s) sum += slabs[s * size + i];
  return sum;
}

}  // namespace sm90
}  // namespace wrn_fast
