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

// The sums of the main source in units of the shortcut's, if that is what comes next. By a factor in any case:
// ptxas serialises products around a condition on accumulators.
template <class T, class Params>
SM90_FN void in_units_of_shortcut(const Params& p, const Job& j, float (&acc)[T::blocks][T::block_k / 2], bool now) {
#pragma unroll
  for (int i = 0; i < T::block_k / 2; ++i) {
    const int k = j.k_block * T::block_k + acc_column(hw::thread() % 32, i);
    const float ratio = now ? hw::from_global(p.factor + k) * hw::reciprocal(hw::from_global(p.factor_short + k)) : 1.f;
#pragma unroll
    for (int m = 0; m < T::blocks; ++m) acc[m][i] *= ratio;
  }
}

// A split's sums as numbers, and the bias on those of the first.
template <class T, class Params>
SM90_FN void as_numbers(const Params& p, const Job& j, float (&acc)[T::blocks][T::block_k / 2], const float* factor) {
#pragma unroll
  for (int i = 0; i < T::block_k / 2; ++i) {
    const int k = j.k_block * T::block_k + acc_column(hw::thread() % 32, i);
    const float of_k = hw::from_global(factor + k), bias = p.bias && j.split == 0 ? hw::from_global(p.bias + k) : 0.f;
#pragma unroll
    for (int m = 0; m < T::blocks; ++m) acc[m][i] = hw::fused(acc[m][i], of_k, bias);
  }
}

}  // namespace sm90
}  // namespace wrn_fast
