// Filters on their way to the GEMM: oriented views of w, and packed panels.
//
// A pack is [panel][matrix][reduction][panel width]: the matrices of the transformed filter for Winograd, R*S taps for
// the direct kernel. Panels hold NR output channels; the last holds VL when that is enough; missing channels are zero.
#pragma once

#include "../problem.h"
#include "gemm.h"

namespace wrn_fast {
namespace WRN_ISA {

// Element (out, reduce, r, s) at data + out*stride_out + reduce*stride_reduce + r*stride_r + s*stride_s.
struct FilterView {
  const void* data;
  DType dtype;
  int64_t out, reduce;
  int R, S;
  int64_t stride_out, stride_reduce, stride_r, stride_s;
};

FilterView fprop_view(const Weight& w, int64_t K, int64_t C, int R, int S);
// C and K exchanged, taps as they are: the direct dgrad indexes them itself.
FilterView dgrad_view(const Weight& w, int64_t K, int64_t C, int R, int S);
// C and K exchanged and both tap axes reversed: dgrad at stride 1 as a plain convolution.
FilterView rotated_view(const Weight& w, int64_t K, int64_t C, int R, int S);

int filter_matrices(Algo algo, const FilterView& f);
int64_t filter_floats(Algo algo, const FilterView& f);
WRN_INLINE int64_t panel_floats(int matrices, int64_t reduce) {
  return matrices * reduce * NR;
}

void pack_filter(Algo algo, const FilterView& f, float* out, int threads);

}  // namespace WRN_ISA
}  // namespace wrn_fast
