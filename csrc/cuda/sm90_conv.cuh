// Convolution on Hopper as an exact-tile implicit GEMM: fprop, and dgrad as the convolution of dy. Not run on a GPU
// yet.
//
//   y[pixel, k] = sum over source, chunk, s, r, c of a[pixel's tap (r, s), c] * w[k, r, s, c], then the epilogue
//
// Persistent: a block takes every gridDim.x-th job of the schedule, a tile of pixels x block_k channels. Warp 0 fetches
// activations (TMA boxes: out of the image is zero) and warp 1 packed filters (bulk copies) into two rings; warps 2 and
// 3 apply the prologue in place; warpgroups 1 and 2 multiply, each its half of the pixels, and run the epilogue
// (sm90_epilogue.cuh), for which warps 2 and 3 also draw the dropout mask. A tile of `blocks` 64-row blocks a warpgroup
// reads each source row_taps times less often than an implicit GEMM that fetches each tap: with row_taps 3 a box brings
// the pixels of one filter column with two rows of halo, and the three filter rows are starts within it. All of them
// lie on the swizzle's period.
#pragma once

#include "sm90_epilogue.cuh"
#include "sm90_hw.cuh"
#include "sm90_plan.h"
#include "sm90_producer.cuh"

namespace wrn_fast {
namespace sm90 {

// The kernel that is compiled for (pass, block_k, pixels, dtype). e4m3: the operands are, dtype is that of the rest.
template <bool dgrad_, int block_k_, int blocks_, int row_taps_, bool fp16_, bool e4m3_ = false>
struct ConvTraits {
  static constexpr int block_k = block_k_, blocks = blocks_, row_taps = row_taps_;
  static constexpr bool dgrad = dgrad_, fp16 = fp16_, e4m3 = e4m3_;
  static constexpr int chunk = e4m3 ? kChunk8 : kChunk;  // channels
  using Memory = ConvMemory<block_k, blocks, row_taps>;
  // Both roles without a spill at 2 x 64 x 160 (ptxas 13.0). e4m3 has no prologue, so its producers need less.
  static constexpr int kConsumerRegisters = e4m3 ? 224 : 216, kProducerRegisters = e4m3 ? 56 : 72;
  static_assert((kConsumers * kConsumerRegisters + kProducerRegisters) * kWarpgroup <= kRegistersMax);
};

// `steps` products of 16 channels (e4m3: 32) for each 64-row block, as one batch.
template <class T, int steps>
SM90_FN void multiply(float (&acc)[T::blocks][T::block_k / 2], const uint64_t (&a)[T::blocks], uint64_t b) {
#pragma unroll
  for (int m = 0; m < T::blocks; ++m) hw::pin(acc[m]);
  hw::wgmma_fence();
#pragma unroll
  for (int k = 0; k < steps; ++k) {
#pragma unroll
    for (int m = 0; m < T::blocks; ++m) {
      const uint64_t at_a = descriptor_plus(a[m], 32 * k), at_b = descriptor_plus(b, 32 * k);
      if constexpr (T::e4m3) {
        hw::wgmma_e4m3<T::block_k>(acc[m], at_a, at_b);
      } else {
        hw::wgmma<T::block_k, T::fp16, false>(acc[m], at_a, at_b);
      }
    }
  }
  hw::wgmma_commit();
#pragma unroll
  for (int m = 0; m < T::blocks; ++m) hw::pin(acc[m]);
}

// The batches of one chunk, at most two in flight. A buffer goes back when the batch after its last reader was issued.
template <class T, int steps, class Params>
SM90_FN void multiply_chunk(const Params& p, uint32_t base, int consumer, const Chunk& k,
                            float (&acc)[T::blocks][T::block_k / 2], Ring& a, Ring& b) {
  using M = typename T::Memory;
  const bool elected = hw::thread() % kWarpgroup == 0;
  const Axis rows = k.source->rows[k.parity >> 1];
  // Buffers of the batch before the running one; -1: none. Not known to the compiler, which would peel a batch.
  int a_done = hw::fresh(-1), b_done = hw::fresh(-1);
  const auto release = [&] {
    if (elected && b_done >= 0) hw::barrier_arrive(base + M::barrier(M::kBEmpty + b_done));
    if (elected && a_done >= 0) hw::barrier_arrive(base + M::barrier(M::kAEmpty + a_done));
  };
#pragma unroll 1
  for (int fetch = 0; fetch < k.columns * k.fetches; ++fetch) {
    hw::barrier_wait(base + M::barrier(M::kAFull + a.index), a.phase);
#pragma unroll 1
    for (int i = 0; i < k.taps; ++i) {
      hw::barrier_wait(base + M::barrier(M::kBFull + b.index), b.phase);
      uint64_t start[T::blocks];
#pragma unroll
      for (int m = 0; m < T::blocks; ++m) {
        start[m] = row_descriptor(
            base + M::a(a.index) +
            a_start(p.schedule.tile, k.halo, (consumer * T::blocks + m) * 64, k.halo ? shift_of(rows, i) : 0));
      }
      multiply<T, steps>(acc, start, row_descriptor(base + M::b(b.index)));
      hw::wgmma_wait<1>();
      release();
      b_done = b.index;
      a_done = i + 1 == k.taps ? a.index : -1;
      b = next(b, M::kBStages);
    }
    a = next(a, M::kAStages);
  }
  hw::wgmma_wait<0>();
#pragma unroll
  for (int m = 0; m < T::blocks; ++m) hw::pin(acc[m]);
  release();
}

// A split leaves its sums in global memory; the last of a job's to arrive adds all of them, in the order of the splits,
// and goes on to the epilogue. The counter is 0 again afterwards. The staging carries the answer to all threads.
template <class T, class Params>
SM90_FN bool last_to_add(const Params& p, uint32_t base, int job, int consumer, float (&acc)[T::block_k / 2]) {
  const int t = hw::thread() % kWarpgroup, splits = p.schedule.splits, block = job / splits;
  const uint32_t answer = base + T::Memory::staging(consumer);
#pragma unroll
  for (int i = 0; i < T::block_k / 2; ++i) {
    p.partials[partial_offset(T::block_k, splits, block, consumer, job - block * splits, i, t)] = acc[i];
  }
  hw::fence_global();
  free_staging(consumer);
  if (t == 0) {
    int* const counter = p.counters + block * kConsumers + consumer;
    const bool last = hw::count_up(counter) == splits - 1;
    if (last) *counter = 0;
    hw::store_float(answer, last ? 1.f : 0.f);
    hw::fence_async();
  }
  sync_consumer(consumer);
  const bool last = hw::load_float(answer) != 0.f;
  sync_consumer(consumer);
  if (!last) return false;
  hw::fence_global();
#pragma unroll
  for (int i = 0; i < T::block_k / 2; ++i) acc[i] = 0.f;
  for (int s = 0; s < splits; ++s) {
#pragma unroll
    for (int i = 0; i < T::block_k / 2; ++i) {
      acc[i] += hw::from_other_block(p.partials + partial_offset(T::block_k, splits, block, consumer, s, i, t));
    }
  }
  return true;
}

template <class T, class Params>
SM90_FN void consume(const Params& p, uint32_t base, int consumer) {
  using M = typename T::Memory;
  const bool elected = hw::thread() % kWarpgroup == 0;
  Ring a, b;
  Side side;
  // The threads of a consumer meet after the last of them has read the mask, to store what it left.
  const auto give_mask = [&] {
    if (draws<T>(p) && elected) hw::barrier_arrive(base + M::barrier(M::kMaskEmpty));
  };
  const int jobs = jobs_of(p.schedule);
  for (int job = hw::block(); job < jobs; job += hw::blocks()) {
    const Job j = job_of(p.schedule, job);
    const bool whole = p.schedule.splits == 1;
    if (p.has_side && elected && whole) request_side<T>(p, base, j, consumer, consumer * T::blocks);
    float acc[T::blocks][T::block_k / 2];
#pragma unroll
    for (int i = 0; i < T::block_k / 2; ++i) {
      const float first = !T::e4m3 && p.bias && j.split == 0
                              ? hw::from_global(p.bias + j.k_block * T::block_k + acc_column(hw::thread() % 32, i))
                              : 0.f;
#pragma unroll
      for (int m = 0; m < T::blocks; ++m) acc[m][i] = first;
    }
    const auto visit = [&](const Chunk& k) {
      // An instance for each length of a batch: ptxas serialises a conditional product.
      const int steps = k16_steps(k.source->channels, k.chunk, T::chunk);
      if (steps == 4) {
        multiply_chunk<T, 4>(p, base, consumer, k, acc, a, b);
      } else if (steps == 3) {
        multiply_chunk<T, 3>(p, base, consumer, k, acc, a, b);
      } else if (steps == 2) {
        multiply_chunk<T, 2>(p, base, consumer, k, acc, a, b);
      } else {
        multiply_chunk<T, 1>(p, base, consumer, k, acc, a, b);
      }
    };
    if constexpr (T::e4m3) {
      const Units u = units_of<T>(p, j);
      for_each_chunk<T>(p, j, u.begin, least(u.end, u.main), visit);
      // An instance of the products for each source: in one loop over both, ptxas would serialise them.
      if (u.main < u.end) {
        in_units_of_shortcut<T>(p, j, acc);
        for_each_chunk<T>(p, j, most(u.begin, u.main), u.end, visit);
      }
    } else {
      for_each_chunk<T>(p, j, visit);
    }
    // Taken and given back also where another block goes on: the mask's barriers count the jobs.
    if (draws<T>(p)) hw::barrier_wait(base + M::barrier(M::kMaskFull), mask_phase(hw::fresh(job)));
    if constexpr (T::blocks == 1) {
      if (!whole) {
        if constexpr (T::e4m3) {
          const Units u = units_of<T>(p, j);
#pragma unroll
          for (int g = 0; g < T::block_k / 16; ++g) {
            as_numbers<T>(p, j.k_block * T::block_k, hw::thread() % 32, g, u.main < u.end, j.split == 0, acc[0]);
          }
        }
        if (!last_to_add<T>(p, base, hw::fresh(job), consumer, acc[0])) {
          give_mask();
          continue;
        }
        if (p.has_side && elected) request_side<T>(p, base, j, consumer, consumer);
      }
    }
    // The job is taken apart again rather than kept: registers are what the main loop is short of.
    finish<T>(p, base, job_of(p.schedule, hw::fresh(job)), consumer, acc, side);
    give_mask();
  }
  if (elected) hw::store_wait_read();
}

template <class T, class Params>
SM90_FN void conv_body(const Params& p) {
  using M = typename T::Memory;
  const uint32_t base = hw::shared_base();
  const int warp = hw::warp_uniform(hw::thread() / 32);
  if (hw::thread() == 0) {
    for (int i = 0; i < M::kAStages; ++i) {
      hw::barrier_init(base + M::barrier(M::kAFull + i), p.prologue ? kTransformers : 1);
      hw::barrier_init(base + M::barrier(M::kAEmpty + i), kConsumers);
      hw::barrier_init(base + M::barrier(M::kARaw + i), 1);
    }
    for (int i = 0; i < M::kBStages; ++i) {
      hw::barrier_init(base + M::barrier(M::kBFull + i), 1);
      hw::barrier_init(base + M::barrier(M::kBEmpty + i), kConsumers);
    }
    for (int i = 0; i < kConsumers; ++i) hw::barrier_init(base + M::barrier(M::kSideFull + i), 1);
    hw::barrier_init(base + M::barrier(M::kMaskFull), kTransformers);
    hw::barrier_init(base + M::barrier(M::kMaskEmpty), kConsumers);
    hw::barrier_init_fence();
    hw::prefetch_map(&p.a);
  }
  hw::sync_block();
  hw::let_next_grid_start();
  // Only the filters may be read before the grid before this one has ended: an early launch promises that it did not
  // write them.
  if (warp < kWarpgroup / 32) {
    hw::registers_down<T::kProducerRegisters>();
    if (warp == 0) {
      if (hw::thread() == 0) {
        hw::wait_for_prior_grid();
        fetch_activations<T>(p, base);
      }
    } else if (warp == 1) {
      if (hw::thread() == 32) fetch_filters<T>(p, base);
    } else if (p.prologue || draws<T>(p)) {
      hw::wait_for_prior_grid();
      prepare<T>(p, base);
    }
  } else {
    hw::registers_up<T::kConsumerRegisters>();
    hw::wait_for_prior_grid();
    consume<T>(p, base, warp / (kWarpgroup / 32) - 1);
  }
}

}  // namespace sm90
}  // namespace wrn_fast
