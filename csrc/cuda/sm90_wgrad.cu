// The kernels of wgrad and their launcher. Not run on a GPU yet.
#include "sm90_wgrad.cuh"

#include "sm90_tensor_map.h"

namespace wrn_fast {

using namespace sm90;

namespace {

using WgradKernel = void (*)(WgradParams<CUtensorMap>);

template <class T>
__global__ void __launch_bounds__(kWgradThreads, 1)
    sm90_wgrad_kernel(const __grid_constant__ WgradParams<CUtensorMap> p) {
  wgrad_body<T>(p);
}

__global__ void __launch_bounds__(256) sum_slabs_kernel(const float* slabs, int splits, int64_t size, float* dw) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += step) {
    dw[i] = sum_slabs(slabs, splits, size, i);
  }
}

WgradKernel kernel_of(int block_k, bool halo, DType dtype) {
  const bool fp16 = dtype == DType::f16;
#define CASE(k, tile, blocks, taps)                                         \
  if (block_k == k) {                                                       \
    return halo ? (fp16 ? sm90_wgrad_kernel<WgradTraits<k, true, true>>     \
                        : sm90_wgrad_kernel<WgradTraits<k, true, false>>)   \
                : (fp16 ? sm90_wgrad_kernel<WgradTraits<k, false, true>>    \
                        : sm90_wgrad_kernel<WgradTraits<k, false, false>>); \
  }
  SM90_FETCH9(CASE)
#undef CASE
  return nullptr;
}

}  // namespace

int64_t sm90_wgrad_workspace(const ConvShape& shape, int multiprocessors) {
  return wgrad_workspace(shape, multiprocessors);
}

cudaError_t sm90_wgrad(const Sm90Wgrad& w, cudaStream_t stream) {
  if (refuses("wgrad", w.shape, w.dtype, Sm90Tile::fetch9)) return cudaErrorInvalidValue;
  int multiprocessors = 0;
  cudaError_t error = multiprocessor_count(&multiprocessors);
  if (error != cudaSuccess) return error;
  const WgradParams<MapSpec> plan = wgrad_params(w, multiprocessors);
  if (!plan.slabs) return cudaErrorInvalidValue;
  WgradParams<CUtensorMap> p{};
  static_cast<WgradScalars&>(p) = plan;
  if (!encode(plan.a, w.dtype, &p.a) || !encode(plan.dy, w.dtype, &p.dy)) return cudaErrorInvalidValue;
  const int block_k = block_k_of(w.shape.K);
  const bool halo = wgrad_halo(w.shape, plan.schedule.tile);
  error = launch_kernel(reinterpret_cast<const void*>(kernel_of(block_k, halo, w.dtype)), &p, wgrad_jobs(plan.grid),
                        kWgradThreads, wgrad_shared_bytes(block_k, halo), false, stream);
  if (error != cudaSuccess || plan.grid.splits == 1) return error;
  const int64_t size = slab_size(w.shape);
  sum_slabs_kernel<<<least(4 * multiprocessors, static_cast<int>(ceil_div(size, 256))), 256, 0, stream>>>(
      plan.slabs, plan.grid.splits, size, w.dw);
  return cudaGetLastError();
}

}  // namespace wrn_fast
