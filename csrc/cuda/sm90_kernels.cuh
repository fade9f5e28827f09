// One compiled kernel a (pass, tile, block_k, dtype): the files sm90_<pass>_<tile>.cu instantiate them. Not run on a
// GPU yet.
#pragma once

#include "sm90_conv.cuh"

namespace wrn_fast {
namespace sm90 {

using ConvKernel = void (*)(ConvParams<CUtensorMap>);

template <class T>
__global__ void __launch_bounds__(kThreads, 1) sm90_conv_kernel(const __grid_constant__ ConvParams<CUtensorMap> p) {
  conv_body<T>(p);
}

// Null: not compiled.
ConvKernel fprop_fetch9(int block_k, DType dtype);
ConvKernel fprop_shift3(int block_k, DType dtype);
ConvKernel fprop_e4m3_fetch9(int block_k, DType dtype);
ConvKernel fprop_e4m3_shift3(int block_k, DType dtype);
ConvKernel dgrad_fetch9(int block_k, DType dtype);
ConvKernel dgrad_shift3(int block_k, DType dtype);

// The body of one of these functions: LIST names the widths.
#define SM90_KERNEL_CASE(DGRAD, K, BLOCKS, TAPS, E4M3)                                              \
  if (block_k == K) {                                                                               \
    return dtype == DType::f16 ? sm90_conv_kernel<ConvTraits<DGRAD, K, BLOCKS, TAPS, true, E4M3>>   \
                               : sm90_conv_kernel<ConvTraits<DGRAD, K, BLOCKS, TAPS, false, E4M3>>; \
  }

}  // namespace sm90
}  // namespace wrn_fast
