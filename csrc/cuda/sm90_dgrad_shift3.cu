// The kernels of dgrad with the tile shift3. Not run on a GPU yet.
#include "sm90_kernels.cuh"

namespace wrn_fast {
namespace sm90 {

ConvKernel dgrad_shift3(int block_k, DType dtype) {
#define CASE(k, tile, blocks, taps) SM90_KERNEL_CASE(true, k, blocks, taps, false)
  SM90_SHIFT3(CASE)
#undef CASE
  return nullptr;
}

}  // namespace sm90
}  // namespace wrn_fast
