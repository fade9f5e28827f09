// Sums of products of e4m3 operands as numbers. Not run on a GPU yet.
//
//   y = factor[k] * sum a8*w8 + factor_short[k] * sum a8_short*w8_short + bias
//
// One accumulator serves both sources: it is in units of the one whose products it takes.
#pragma once

#include "sm90_hw.cuh"
#include "sm90_plan.h"

namespace wrn_fast {
namespace sm90 {

// The sums of the main source in units of the shortcut's. A lane has the ratios of two columns in 64 and gives them to
// the others: were each lane to fetch its own, they would be in flight all at once, and spill.
template <class T, class Params>
SM90_FN void in_units_of_shortcut(const Params& p, const Job& j, float (&acc)[T::blocks][T::block_k / 2]) {
  constexpr int held = (T::block_k + 63) / 64;
  const int lane = hw::thread() % 32;
  float ratio[held][2];
#pragma unroll
  for (int i = 0; i < 2 * held; ++i) {
    const int column = 64 * (i / 2) + 2 * lane + i % 2, k = j.k_block * T::block_k + column;
    ratio[i / 2][i % 2] =
        column < T::block_k ? hw::from_global(p.factor + k) * hw::reciprocal(hw::from_global(p.factor_short + k)) : 1.f;
  }
#pragma unroll
  for (int i = 0; i < T::block_k / 4; ++i) {
    const int group = i / 2, bit = i % 2;
    const float mine = hw::shuffle(ratio[group / 8][bit], group % 8 * 4 + (lane & 3));
#pragma unroll
    for (int m = 0; m < T::blocks; ++m) {
      acc[m][acc_reg(group, 0, bit)] *= mine;
      acc[m][acc_reg(group, 1, bit)] *= mine;
    }
  }
}

// Columns of a group of 16 as numbers, with the bias.
template <class T, class Params>
SM90_FN void as_numbers(const Params& p, int k0, int lane, int g, bool of_short, bool with_bias,
                        float (&acc)[T::block_k / 2]) {
  const float* const factor = of_short ? p.factor_short : p.factor;
#pragma unroll
  for (int i = 8 * g; i < 8 * (g + 1); ++i) {
    const int k = k0 + acc_column(lane, i);
    acc[i] = hw::fused(acc[i], hw::from_global(factor + k), p.bias && with_bias ? hw::from_global(p.bias + k) : 0.f);
  }
}

}  // namespace sm90
}  // namespace wrn_fast
