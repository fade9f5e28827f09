// The epilogues of the Hopper convolution. Not run on a GPU yet.
//
//   fprop: v = drop(acc + residual), acc having begun as the bias; y = round(v); moments of y;
//          y_act = round(drop(act(v * scale + shift))); at most one of the two is dropped
//   dgrad: g = round(acc * act'(x * scale + shift)); sums of g and of g * (x - mean) * rstd
//
// A consumer warpgroup stages 64 rows at a time: the second operand comes into the staging by TMA while the main loop
// runs, results leave it by TMA. Sums have a fixed order: rows of a thread, lanes, warps; a part is 64 rows,
// and parts are merged elsewhere.
#pragma once

#include "sm90_dropout.cuh"
#include "sm90_e4m3.cuh"
#include "sm90_hw.cuh"
#include "sm90_plan.h"

namespace wrn_fast {
namespace sm90 {

template <int n>
SM90_FN void activate(float (&v)[n], Act act, float slope) {
  if (act == Act::relu) {
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] = hw::max_nan(v[i], 0.f);
  } else if (act == Act::leaky_relu) {
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] = v[i] > 0.f ? v[i] : v[i] * slope;
  } else if (act == Act::silu) {
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] *= hw::reciprocal(1.f + hw::exponential(-v[i]));
  }
}

// g[i] * act'(v[i]): 0 at 0 for relu, `slope` at 0 for leaky_relu, as PyTorch.
template <int n>
SM90_FN void activate_backward(float (&g)[n], const float (&v)[n], Act act, float slope) {
  if (act == Act::relu) {
#pragma unroll
    for (int i = 0; i < n; ++i) g[i] = v[i] <= 0.f ? 0.f : g[i];
  } else if (act == Act::leaky_relu) {
#pragma unroll
    for (int i = 0; i < n; ++i) g[i] = v[i] > 0.f ? g[i] : g[i] * slope;
  } else if (act == Act::silu) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float s = hw::reciprocal(1.f + hw::exponential(-v[i]));
      g[i] *= s * hw::fused(v[i], 1.f - s, 1.f);
    }
  }
}

// Column sums over the 8 lanes that hold one column: each step halves the columns of a lane. sum_channel() says which
// one a lane is left with. `add` false only picks that column of values that all 8 lanes share.
template <bool add, int half, int mask>
SM90_FN void halve(float (&v)[4], int lane) {
  const bool upper = lane & mask;
#pragma unroll
  for (int i = 0; i < half; ++i) {
    const float kept = upper ? v[i + half] : v[i], given = upper ? v[i] : v[i + half];
    v[i] = add ? kept + hw::shuffle_xor(given, mask) : kept;
  }
}
template <bool add>
SM90_FN float to_lanes(float (&v)[4], int lane) {
  halve<add, 2, 16>(v, lane);
  halve<add, 1, 8>(v, lane);
  return add ? v[0] + hw::shuffle_xor(v[0], 4) : v[0];
}

// Chan's merge of a second set into (count, mean, M2).
SM90_FN void merge(float& count, float& mean, float& m2, float count_b, float mean_b, float m2_b) {
  if (count_b == 0.f) return;
  const float delta = mean_b - mean, share = count_b * hw::reciprocal(count + count_b);
  mean = hw::fused(delta, share, mean);
  m2 = hw::fused(delta * (share * count), delta, m2 + m2_b);
  count += count_b;
}

// What the second operand's barrier waits for next.
struct Side {
  uint32_t phase = 0;
};

SM90_FN void sync_consumer(int consumer) {
  if (consumer == 0) {
    hw::sync_named<1, kWarpgroup>();
  } else {
    hw::sync_named<2, kWarpgroup>();
  }
}

// By one thread: the second operand of 64 rows, once the stores before have left the staging.
template <class T, class Params>
SM90_FN void request_side(const Params& p, uint32_t base, const Job& j, int consumer, int block) {
  using M = typename T::Memory;
  const Pixel o = pixel_of_row(p.schedule.tile, block * 64);
  const uint32_t full = base + M::barrier(M::kSideFull + consumer);
  hw::store_wait_read();
  hw::barrier_expect(full, M::kStaging);
  hw::load_box5(base + M::staging(consumer), &p.side[j.parity], full, 0, j.origin.q + o.q, j.origin.p + o.p,
                j.origin.n + o.n, j.k_block * (T::block_k / plane_channels(T::block_k)));
}

// After this every thread of the consumer may write the staging.
SM90_FN void free_staging(int consumer) {
  if (hw::thread() % kWarpgroup == 0) hw::store_wait_read();
  sync_consumer(consumer);
}

// Rounds 64 rows into the staging, once that is free, and sends them off. On return it may still be read.
template <class T, class Params>
SM90_FN void store_rows(const Params& p, uint32_t staging, const hw::Map* map, const Job& j, int consumer, int block,
                        int t, const float (&acc)[T::block_k / 2]) {
  free_staging(consumer);
#pragma unroll
  for (int pair = 0; pair < T::block_k / 16; ++pair) {
    hw::Vector packed;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int reg = acc_reg(2 * pair + i / 2, i & 1, 0);
      packed.word[i] = hw::pack<T::fp16>(acc[reg], acc[reg + 1]);
    }
    hw::store_matrices(staging + stmatrix_offset(T::block_k, t / 32, t % 32, pair), packed);
  }
  hw::fence_async();
  sync_consumer(consumer);
  if (t == 0) {
    const Pixel o = pixel_of_row(p.schedule.tile, block * 64);
    hw::store_box5(map, staging, 0, j.origin.q + o.q, j.origin.p + o.p, j.origin.n + o.n,
                   j.k_block * (T::block_k / plane_channels(T::block_k)));
    hw::store_commit();
  }
}

// Where a thread stands in 64 rows of a job.
struct Place {
  uint32_t staging = 0;
  uint32_t mask = 0;  // of the first of its rows
  int k0 = 0, warp = 0, lane = 0;
  bool valid[2] = {};   // rows acc_row(.., h) lie in the image
  float inverse = 0.f;  // 1 / number of the warp's 16 rows that do, 0 for none
};

template <class T>
SM90_FN uint32_t load_side(const Place& at, int h, int column) {
  return hw::load_word(at.staging + staging_offset(T::block_k, acc_row(at.warp, at.lane, 2 * h), column));
}

// Two values as they will be stored. Packed in the other order than the store has them: ptxas would keep 40 shared
// words from here to there, and spill.
template <class T>
SM90_FN void round_pair(float low, float high, float (&stored)[2]) {
  const uint32_t swapped = hw::pack<T::fp16>(high, low);
  stored[0] = hw::high_half<T::fp16>(swapped);
  stored[1] = hw::low_half<T::fp16>(swapped);
}

// The two sums of a lane's column in one group.
struct Sums {
  float first = 0.f, second = 0.f;
};

// A warp's sums of one plane of channels go where its second operand of that plane was: only the warp itself read that.
template <class T>
SM90_FN void leave_sums(const Place& at, int plane, const Sums (&sums)[plane_channels(T::block_k) / 16]) {
  constexpr int groups = plane_channels(T::block_k) / 16;
  hw::sync_warp();
#pragma unroll
  for (int i = 0; i < groups; ++i) {
    const int which = at.lane >> 2 & 1, column = sum_channel(plane * groups + i, at.lane);
    hw::store_float(at.staging + exchange_offset(T::block_k, at.warp, which, column),
                    which ? sums[i].second : sums[i].first);
  }
}

template <class T>
SM90_FN void add_side(const Place& at, int g, float (&acc)[T::block_k / 2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int j = 2 * g + i / 2, h = i & 1;
    const uint32_t r = load_side<T>(at, h, 8 * j + 2 * (at.lane & 3));
    acc[acc_reg(j, h, 0)] += hw::low_half<T::fp16>(r);
    acc[acc_reg(j, h, 1)] += hw::high_half<T::fp16>(r);
  }
}

// fprop, one group of columns: the residual into the accumulators, dropout, moments of the values as stored.
template <class T, class Params>
SM90_FN void fprop_group(const Params& p, const Place& at, int g, float (&acc)[T::block_k / 2], Sums& sums) {
  if constexpr (T::e4m3) {
    // Sums of a split call are numbers already.
    if (p.schedule.splits == 1) as_numbers<T>(p, at.k0, at.lane, g, p.source_short.channels > 0, true, acc);
  }
  if (p.has_side) add_side<T>(at, g, acc);
  if (p.drop_y) drop_group<T>(p, at.mask, at.lane, g, acc);
  if (!p.sums) return;
  float sum[4], square[4], pivot[4];
#pragma unroll
  for (int c = 0; c < 4; c += 2) {
    const int j = 2 * g + c / 2;
    float stored[2][2];
#pragma unroll
    for (int h = 0; h < 2; ++h) round_pair<T>(acc[acc_reg(j, h, 0)], acc[acc_reg(j, h, 1)], stored[h]);
    // Around a value of the column itself, so that a large mean costs no digits. Row 0 of a warp lies in the image if
    // any of its rows does.
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      pivot[c + b] = hw::shuffle(stored[0][b], at.lane & 3);
      const float d0 = at.valid[0] ? stored[0][b] - pivot[c + b] : 0.f;
      const float d1 = at.valid[1] ? stored[1][b] - pivot[c + b] : 0.f;
      sum[c + b] = d0 + d1;
      square[c + b] = hw::fused(d0, d0, d1 * d1);
    }
  }
  const float total = to_lanes<true>(sum, at.lane), squares = to_lanes<true>(square, at.lane);
  const float offset = total * at.inverse, mean = to_lanes<false>(pivot, at.lane) + offset;
  sums.first = at.inverse > 0.f ? mean : 0.f;
  sums.second = hw::max_nan(squares - total * offset, 0.f);
}

// drop(act(acc * scale + shift)) for the second output of fprop.
template <class T, class Params>
SM90_FN void activate_columns(const Params& p, const Place& at, float (&acc)[T::block_k / 2]) {
#pragma unroll
  for (int g = 0; g < T::block_k / 16; ++g) {
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int k = at.k0 + acc_column(at.lane, 8 * g + i);
      const float scale = p.scale ? hw::from_global(p.scale + k) : 1.f;
      const float shift = p.shift ? hw::from_global(p.shift + k) : 0.f;
      v[i] = hw::fused(acc[8 * g + i], scale, shift);
    }
    activate(v, p.act, p.slope);
#pragma unroll
    for (int i = 0; i < 8; ++i) acc[8 * g + i] = v[i];
    if (p.drop_act) drop_group<T>(p, at.mask, at.lane, g, acc);
  }
}

// dgrad, one group of columns: act' into the accumulators, sums of the gradient as stored.
template <class T, class Params>
SM90_FN void dgrad_group(const Params& p, const Place& at, int g, float (&acc)[T::block_k / 2], Sums& sums) {
  float sum[4], product[4];
#pragma unroll
  for (int c = 0; c < 4; c += 2) {
    const int j = 2 * g + c / 2, column = 8 * j + 2 * (at.lane & 3), k = at.k0 + column;
    float scale[2] = {1.f, 1.f}, shift[2] = {0.f, 0.f}, mean[2] = {0.f, 0.f}, rstd[2] = {0.f, 0.f};
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      if (p.scale) {
        scale[b] = hw::from_global(p.scale + k + b);
        shift[b] = hw::from_global(p.shift + k + b);
      }
      if (p.sums) {
        mean[b] = hw::from_global(p.mean + k + b);
        rstd[b] = hw::from_global(p.rstd + k + b);
        sum[c + b] = product[c + b] = 0.f;
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t word = load_side<T>(at, h, column);
      const float x[2] = {hw::low_half<T::fp16>(word), hw::high_half<T::fp16>(word)};
      float& low = acc[acc_reg(j, h, 0)];
      float& high = acc[acc_reg(j, h, 1)];
      float grad[2] = {low, high};
      const float v[2] = {hw::fused(x[0], scale[0], shift[0]), hw::fused(x[1], scale[1], shift[1])};
      activate_backward(grad, v, p.act, p.slope);
      low = grad[0];
      high = grad[1];
      if (p.sums && at.valid[h]) {
        float stored[2];
        round_pair<T>(low, high, stored);
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          sum[c + b] += stored[b];
          product[c + b] = hw::fused(stored[b], (x[b] - mean[b]) * rstd[b], product[c + b]);
        }
      }
    }
  }
  if (!p.sums) return;
  sums.first = to_lanes<true>(sum, at.lane);
  sums.second = to_lanes<true>(product, at.lane);
}

// The sums of the four warps leave as one part, in the order of the warps.
template <class T, class Params>
SM90_FN void write_part(const Params& p, uint32_t staging, const Job& j, int block, int t) {
  const int64_t part = part_of(j.pixel_tile, T::blocks, block),
                K = static_cast<int64_t>(T::block_k) * p.schedule.k_blocks;
  for (int column = t; column < T::block_k; column += kWarpgroup) {
    float count = 0.f, first = 0.f, second = 0.f;
    for (int w = 0; w < kWarpgroup / 32; ++w) {
      const float a = hw::load_float(staging + exchange_offset(T::block_k, w, 0, column));
      const float b = hw::load_float(staging + exchange_offset(T::block_k, w, 1, column));
      if constexpr (T::dgrad) {
        first += a;
        second += b;
      } else {
        merge(count, first, second,
              static_cast<float>(valid_rows(p.schedule.tile, j.origin, p.out[j.parity], block * 64 + w * 16, 4)), a, b);
      }
    }
    float* const out = p.sums + part * 2 * K + j.k_block * T::block_k + column;
    out[0] = first;
    out[K] = second;
    if (p.counts && j.k_block == 0 && column == 0) p.counts[part] = count;
  }
}

template <class T, class Params>
SM90_FN void finish(const Params& p, uint32_t base, const Job& j, int consumer, float (&acc)[T::blocks][T::block_k / 2],
                    Side& side) {
  using M = typename T::Memory;
  // Addresses made from the thread's number are not worth a register during the main loop.
  const int t = hw::fresh(hw::thread() % kWarpgroup);
  Place at;
  at.staging = base + M::staging(consumer);
  at.k0 = j.k_block * T::block_k;
  at.warp = t / 32;
  at.lane = t % 32;
#pragma unroll
  for (int m = 0; m < T::blocks; ++m) {
    const int block = consumer * T::blocks + m, row = block * 64 + at.warp * 16;
    const int rows = valid_rows(p.schedule.tile, j.origin, p.out[j.parity], row, 4);
    at.mask = base + M::mask() + mask_offset(T::block_k, row + at.lane / 4, 0);
    at.inverse = rows ? hw::reciprocal(static_cast<float>(rows)) : 0.f;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      at.valid[h] = row_is_valid(p.schedule.tile, j.origin, p.out[j.parity], row + at.lane / 4 + 8 * h);
    }
    if (p.has_side) {
      // That of the first block was asked for before the main loop.
      if (m > 0 && t == 0) request_side<T>(p, base, j, consumer, block);
      hw::barrier_wait(base + M::barrier(M::kSideFull + consumer), side.phase);
      side.phase ^= 1;
    } else if (p.sums) {
      free_staging(consumer);
    }
#pragma unroll
    for (int plane = 0; plane < T::block_k / plane_channels(T::block_k); ++plane) {
      constexpr int groups = plane_channels(T::block_k) / 16;
      Sums sums[groups];
#pragma unroll
      for (int i = 0; i < groups; ++i) {
        if constexpr (!T::dgrad) {
          fprop_group<T>(p, at, plane * groups + i, acc[m], sums[i]);
        } else if (p.has_side) {
          dgrad_group<T>(p, at, plane * groups + i, acc[m], sums[i]);
        }
      }
      if (p.sums) leave_sums<T>(at, plane, sums);
    }
    if (p.sums) {
      sync_consumer(consumer);
      write_part<T>(p, at.staging, j, block, t);
    }
    if (p.has_y) store_rows<T>(p, at.staging, &p.y[j.parity], j, consumer, block, t, acc[m]);
    if (!T::dgrad && p.has_act) {
      activate_columns<T>(p, at, acc[m]);
      store_rows<T>(p, at.staging, &p.y_act, j, consumer, block, t, acc[m]);
    }
  }
}

}  // namespace sm90
}  // namespace wrn_fast
