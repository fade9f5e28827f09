// Fused Winograd F(m x m, 3x3), m = 4, 3 or 2: y = A^T [ (G w G^T) * (B^T prologue(x) B) ] A, then the epilogue.
//
// Points 0, +-5/8, +-3/2, infinity for m = 4 (2.2x less error than the usual 0, +-1, +-2 at the same cost, every
// constant exact in fp32), +-3/8, +-5/4, infinity for m = 3 and 0, +-1, infinity for m = 2; at stride 2 a polyphase
// form (winograd_points.h). A row of tiles of one image is a strip: the unit of the input transform, of work and of
// statistics. V [n squared][tiles][channels], n products a dimension, is multiplied panel by panel into M [tile][n
// squared][NR], which the output transform consumes while it is in L2.
#pragma once

#include "conv.h"
#include "epilogue.h"
#include "filter.h"

namespace wrn_fast {
namespace WRN_ISA {

// The tensor that the input transform reads: x of fprop with its prologue, dy of dgrad with none.
struct WinogradInput {
  const void* data;
  DType dtype;
  int64_t N, H, W, C;
  int pad_top, pad_left;
  Prologue prologue;
  // Set by winograd(): C rounded up to VL, the row length of V; tiles across the output; the prologue's arrays.
  int64_t padded;
  int64_t tile_cols;
  PaddedAffine affine;
};

// Transforms channels [c0, c1) (multiples of VL) of one strip; tile j goes to v[xi * plane + j * in.padded + c].
using InputTransform = void (*)(const WinogradInput& in, int64_t image, int64_t tile_row, int64_t c0, int64_t c1,
                                float* v, int64_t plane, float* scratch);
InputTransform input_transform(Algo algo, const WinogradInput& in);
int64_t input_scratch_floats(Algo algo, const WinogradInput& in);

// products [n squared][nv * VL] of one tile -> tile [m][m][nv * VL].
using OutputTransform = void (*)(const float* products, int nv, float* tile);
OutputTransform output_transform(Algo algo);

// Everything that fprop and dgrad do not share has been resolved: source, filter orientation, epilogue.
struct WinogradCall {
  Algo algo;
  int threads;
  WinogradInput input;
  FilterView filter;
  const float* packed;  // null: the filter is transformed here
  int64_t out_H, out_W, out_C;
  Epilogue epilogue;
};

// statistics: stats_y or sums_g, null when not wanted. Throws std::bad_alloc before any thread starts.
void winograd(const WinogradCall& call, float* statistics);

}  // namespace WRN_ISA
}  // namespace wrn_fast
