// Implicit GEMM for any filter of up to kTapsMax taps and any stride, and its dgrad; the 1x1 shortcut rides along as
// one more tap.
//
// The prologue runs once a pixel into a zero-bordered fp32 buffer of a few rows; every tap then reads rows of that
// buffer in place: one GEMM segment a tap. dgrad gathers: output column w meets tap s where (w + pad_left - s) is a
// multiple of the stride, so the columns of one phase w % stride share their taps and step through dy one by one.
#pragma once

#include "conv.h"
#include "epilogue.h"
#include "filter.h"

namespace wrn_fast {
namespace WRN_ISA {

void direct_fprop(const FpropArgs& args);
void direct_dgrad(const DgradArgs& args);

// A tensor on its way into the buffer. Buffer row 0, column 0 is pixel (first_row(...), first_col) of the tensor.
struct DirectSource {
  const void* data;
  DType dtype;
  int64_t H, W, C, padded;
  Prologue prologue;
  PaddedAffine affine;
  int64_t step;        // pixels between buffer rows and columns: 1, or the stride of a 1x1 filter
  int64_t first_col;   // of buffer column 0, may be negative
  int64_t rows, cols;  // of the buffer of one chunk
};

// Row `h` of image `image` (zeros when outside) into out [cols][padded]; multipliers: scratch of W*C + VL floats.
void fill_row(const DirectSource& source, int64_t image, int64_t h, float* out, float* multipliers);

}  // namespace WRN_ISA
}  // namespace wrn_fast
