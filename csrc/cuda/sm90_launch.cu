// The launchers of fprop and dgrad: plans, tensor maps, grid. Not run on a GPU yet.
#include <algorithm>

#include "sm90_kernels.cuh"
#include "sm90_tensor_map.h"

namespace wrn_fast {

using namespace sm90;

namespace {

cudaError_t launch(const ConvParams<MapSpec>& plan, DType dtype, ConvKernel kernel, uint32_t shared_bytes, bool early,
                   cudaStream_t stream) {
  ConvParams<CUtensorMap> p{};
  static_cast<ConvScalars&>(p) = plan;
  bool good =
      encode(plan.a, dtype, &p.a) && encode(plan.a_short, dtype, &p.a_short) && encode(plan.y_act, dtype, &p.y_act);
  for (int i = 0; i < 4; ++i)
    good = good && encode(plan.side[i], dtype, &p.side[i]) && encode(plan.y[i], dtype, &p.y[i]);
  if (!good) return cudaErrorInvalidValue;
  int multiprocessors = 0;
  const cudaError_t error = multiprocessor_count(&multiprocessors);
  if (error != cudaSuccess) return error;
  return launch_kernel(reinterpret_cast<const void*>(kernel), &p, std::min(jobs_of(plan.schedule), multiprocessors),
                       kThreads, shared_bytes, early, stream);
}

}  // namespace

const char* sm90_refuses(const char* op, const ConvShape& shape, DType dtype, Sm90Tile tile) {
  return refuses(op, shape, dtype, tile);
}

int64_t sm90_parts(const ConvShape& shape, bool dgrad, Sm90Tile tile) {
  return parts_of(shape, dgrad, tile);
}

int sm90_splits(const ConvShape& shape, int64_t short_C, bool dgrad, int multiprocessors, bool e4m3) {
  return splits_of(shape, short_C, dgrad, multiprocessors, e4m3);
}

int64_t sm90_partial_bytes(const ConvShape& shape, bool dgrad, int splits) {
  return partial_bytes(shape, dgrad, splits);
}

int64_t sm90_counters(const ConvShape& shape, bool dgrad) {
  return split_blocks(shape, dgrad);
}

int sm90_block_k(int64_t K) {
  return block_k_of(K);
}

int64_t sm90_packed_bytes(int64_t K, int64_t C, int R, int S, bool e4m3) {
  return packed_bytes(K, C, R, S, e4m3);
}

cudaError_t sm90_fprop(const Sm90Fprop& f, cudaStream_t stream) {
  const char* const op = f.factor ? "fprop_fp8" : "fprop";
  if (refuses(op, f.shape, f.dtype, f.tile) || refuses_launch(f, f.tile)) return cudaErrorInvalidValue;
  const int block_k = block_k_of(f.shape.K);
  const bool shift3 = f.tile == Sm90Tile::shift3;
  const auto kernel = f.factor ? (shift3 ? fprop_e4m3_shift3 : fprop_e4m3_fetch9)
                      : shift3 ? fprop_shift3
                               : fprop_fetch9;
  return launch(fprop_params(f), f.dtype, kernel(block_k, f.dtype), shared_bytes_of(block_k, f.tile), f.early, stream);
}

cudaError_t sm90_dgrad(const Sm90Dgrad& d, cudaStream_t stream) {
  if (refuses("dgrad", d.shape, d.dtype, d.tile) || refuses_launch(d, d.tile)) return cudaErrorInvalidValue;
  const int block_k = block_k_of(d.shape.C);
  const bool shift3 = d.tile == Sm90Tile::shift3;
  return launch(dgrad_params(d), d.dtype, (shift3 ? dgrad_shift3 : dgrad_fetch9)(block_k, d.dtype),
                shared_bytes_of(block_k, d.tile), d.early, stream);
}

}  // namespace wrn_fast
