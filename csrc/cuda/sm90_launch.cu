// The launchers of sm90.h: plans, tensor maps, grid. Not run on a GPU yet.
#include <cuda.h>
#include <cudaTypedefs.h>

#include <algorithm>

#include "sm90_kernels.cuh"

namespace wrn_fast {

using namespace sm90;

namespace {

// cuTensorMapEncodeTiled, taken from the driver that is loaded: the extension links no libcuda.
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
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
uint64_t span_of(const MapSpec& m) {
  uint64_t bytes = m.dims[0] * 2;
  for (int d = 1; d < m.rank; ++d) bytes += (m.dims[d] - 1) * m.strides[d - 1];
  return bytes;
}

CUtensorMapSwizzle driver_swizzle(Swizzle s) {
  return s == Swizzle::b128  ? CU_TENSOR_MAP_SWIZZLE_128B
         : s == Swizzle::b64 ? CU_TENSOR_MAP_SWIZZLE_64B
         : s == Swizzle::b32 ? CU_TENSOR_MAP_SWIZZLE_32B
                             : CU_TENSOR_MAP_SWIZZLE_NONE;
}

// Absent maps stay as they are: no kernel reads them.
bool encode(const MapSpec& m, DType dtype, CUtensorMap* out) {
  if (m.rank == 0) return true;
  const auto call = encoder();
  if (!call) return false;
  const CUtensorMapDataType type =
      dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
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

cudaError_t launch(const ConvParams<MapSpec>& plan, DType dtype, ConvKernel kernel, uint32_t shared_bytes,
                   cudaStream_t stream) {
  if (!kernel) return cudaErrorInvalidValue;
  ConvParams<CUtensorMap> p{};
  static_cast<ConvScalars&>(p) = plan;
  bool good =
      encode(plan.a, dtype, &p.a) && encode(plan.a_short, dtype, &p.a_short) && encode(plan.y_act, dtype, &p.y_act);
  for (int i = 0; i < 4; ++i)
    good = good && encode(plan.side[i], dtype, &p.side[i]) && encode(plan.y[i], dtype, &p.y[i]);
  if (!good) return cudaErrorInvalidValue;
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  const void* const entry = reinterpret_cast<const void*>(kernel);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
  if (error != cudaSuccess) return error;
  void* arguments[] = {&p};
  return cudaLaunchKernel(entry, dim3(std::min(jobs_of(plan.schedule), multiprocessors)), dim3(kThreads), arguments,
                          shared_bytes, stream);
}

}  // namespace

const char* sm90_refuses(const char* op, const ConvShape& shape, DType dtype, Sm90Tile tile) {
  return refuses(op, shape, dtype, tile);
}

int64_t sm90_parts(const ConvShape& shape, bool dgrad, Sm90Tile tile) {
  return parts_of(shape, dgrad, tile);
}

int sm90_block_k(int64_t K) {
  return block_k_of(K);
}

int64_t sm90_packed_bytes(int64_t K, int64_t C, int R, int S) {
  return packed_bytes(K, C, R, S);
}

cudaError_t sm90_fprop(const Sm90Fprop& f, cudaStream_t stream) {
  if (refuses("fprop", f.shape, f.dtype, f.tile)) return cudaErrorInvalidValue;
  const int block_k = block_k_of(f.shape.K);
  const bool shift3 = f.tile == Sm90Tile::shift3;
  return launch(fprop_params(f), f.dtype, (shift3 ? fprop_shift3 : fprop_fetch9)(block_k, f.dtype),
                shared_bytes_of(block_k, f.tile), stream);
}

cudaError_t sm90_dgrad(const Sm90Dgrad& d, cudaStream_t stream) {
  if (refuses("dgrad", d.shape, d.dtype, d.tile)) return cudaErrorInvalidValue;
  const int block_k = block_k_of(d.shape.C);
  const bool shift3 = d.tile == Sm90Tile::shift3;
  return launch(dgrad_params(d), d.dtype, (shift3 ? dgrad_shift3 : dgrad_fetch9)(block_k, d.dtype),
                shared_bytes_of(block_k, d.tile), stream);
}

}  // namespace wrn_fast
