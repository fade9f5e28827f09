// The thin layer between the kernels of common*.cu and the GPU. Tests compile the same kernels for the CPU and put a
// layer of their own in the place of this one.
#pragma once

#ifdef WRN_DEVICE_LAYER
#include WRN_DEVICE_LAYER
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstring>

#include "common.h"

#define WRN_DEVICE __device__ __forceinline__

namespace wrn_fast {
namespace cuda {

constexpr int kThreads = 256;  // of every block

using Half = __half;
using BFloat = __nv_bfloat16;
using Bits128 = uint4;
// 4 bits of exponent, 3 of mantissa, no infinities.
struct E4M3 {
  uint8_t bits;
};

WRN_DEVICE float widen(float v) {
  return v;
}
WRN_DEVICE double widen(double v) {
  return v;
}
WRN_DEVICE float widen(Half v) {
  return __half2float(v);
}
WRN_DEVICE float widen(BFloat v) {
  return __bfloat162float(v);
}
template <class T>
WRN_DEVICE T narrow(double v) {
  return static_cast<T>(v);
}
template <class T>
WRN_DEVICE T narrow(float v) {
  return static_cast<T>(v);
}
template <>
WRN_DEVICE Half narrow<Half>(float v) {
  return __float2half_rn(v);
}
template <>
WRN_DEVICE BFloat narrow<BFloat>(float v) {
  return __float2bfloat16_rn(v);
}

// To nearest even; beyond the largest number that one. NaN stays NaN.
template <>
WRN_DEVICE E4M3 narrow<E4M3>(float v) {
  return {__nv_cvt_float_to_fp8(v, __NV_SATFINITE, __NV_E4M3)};
}

WRN_DEVICE Bits128 load128(const void* p) {
  return *static_cast<const uint4*>(p);
}
WRN_DEVICE void store128(void* p, Bits128 bits) {
  *static_cast<uint4*>(p) = bits;
}

// A value of each thread that lives across barriers.
template <class T>
struct PerThread {
  T value;
  WRN_DEVICE T& operator[](int) { return value; }
};

// One block of kThreads threads. `each` runs its argument in every thread and then waits for all of them.
struct Block {
  int64_t x;
  int y;

  template <class F>
  WRN_DEVICE void each(F f) const {
    f(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
};

// At most 128 registers: two blocks a multiprocessor keep enough loads in flight.
template <class Kernel>
__global__ void __launch_bounds__(kThreads, 2) run(const Kernel kernel) {
  __shared__ typename Kernel::Shared shared;
  kernel(Block{static_cast<int64_t>(blockIdx.x), static_cast<int>(blockIdx.y)}, shared);
}

template <class Kernel>
void launch(int64_t grid_x, int grid_y, const Kernel& kernel, Stream stream) {
  run<<<dim3(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y)), kThreads, 0,
        static_cast<cudaStream_t>(stream)>>>(kernel);
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) throw Error(cudaGetErrorString(status));
}

}  // namespace cuda
}  // namespace wrn_fast

#endif
