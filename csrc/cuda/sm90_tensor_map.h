// Tensor maps by the driver, and what every Hopper launch needs. Host code. Not run on a GPU yet.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include "sm90_plan.h"

namespace wrn_fast {
namespace sm90 {

// cuTensorMapEncodeTiled, taken from the driver that is loaded: the extension links no libcuda.
inline PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static const PFN_cuTensorMapEncodeTiled_v12000 found = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess
               ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry)
               : nullptr;
  }();
  return found;
}

// Bytes from the first to past the last element.
inline uint64_t span_of(const MapSpec& m) {
  uint64_t bytes = m.dims[0] * m.element;
  for (int d = 1; d < m.rank; ++d) bytes += (m.dims[d] - 1) * m.strides[d - 1];
  return bytes;
}

inline CUtensorMapSwizzle driver_swizzle(Swizzle s) {
  return s == Swizzle::b128  ? CU_TENSOR_MAP_SWIZZLE_128B
         : s == Swizzle::b64 ? CU_TENSOR_MAP_SWIZZLE_64B
         : s == Swizzle::b32 ? CU_TENSOR_MAP_SWIZZLE_32B
                             : CU_TENSOR_MAP_SWIZZLE_NONE;
}

// Absent maps stay as they are: no kernel reads them.
inline bool encode(const MapSpec& m, DType dtype, CUtensorMap* out) {
  if (m.rank == 0) return true;
  const auto call = encoder();
  if (!call) return false;
  const CUtensorMapDataType type = m.element == 1        ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                         : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  if (call(out, type, m.rank, const_cast<void*>(m.base), m.dims, m.strides, m.box, m.steps,
           CU_TENSOR_MAP_INTERLEAVE_NONE, driver_swizzle(m.swizzle), CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
           CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS) {
    return false;
  }
  // Drivers up to 13.1 set a bit that is wrong for a tensor of less than 128 KiB; CUTLASS clears it likewise.
  int driver = 0;
  if (cudaDriverGetVersion(&driver) == cudaSuccess && driver <= 13010 && span_of(m) < 131072) {
    reinterpret_cast<uint64_t*>(out)[1] &= ~(uint64_t{1} << 21);
  }
  return true;
}

inline cudaError_t multiprocessor_count(int* count) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error == cudaSuccess ? cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device) : error;
}

// One launch with `shared_bytes` of dynamic shared memory; null: a kernel that was not compiled. early: by programmatic
// dependent launch.
inline cudaError_t launch_kernel(const void* kernel, void* params, int blocks, int threads, uint32_t shared_bytes,
                                 bool early, cudaStream_t stream) {
  if (!kernel) return cudaErrorInvalidValue;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute dependent{};
  dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  dependent.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &dependent;
  config.numAttrs = early ? 1 : 0;
  void* arguments[] = {params};
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

}  // namespace sm90
}  // namespace wrn_fast
