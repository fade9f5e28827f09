// The kernels of fprop with operands in e4m3, with the tile fetch9. Not run on a GPU yet.
#include "sm90_kernels.cuh"

namespace wrn_fast {
namespace sm90 {

ConvKernel fprop_e4m3_fetch9(int block_k, DType dtype) {
#define CASE(k, tile, blocks, taps) SM90_KERNEL_CASE(false, k, blocks, taps, true)
  SM90_FETCH9(CASE)
#undef CASE
  return nullptr;
}

}  // namespace sm90
}  // namespace wrn_fast
