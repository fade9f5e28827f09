// fprop, dgrad and pack: arguments to the algorithm that runs them.
#include "conv.h"

#include "direct.h"
#include "filter.h"
#include "winograd.h"

namespace wrn_fast {
namespace WRN_ISA {
namespace {

// The 1x1 shortcut alone, stored where the Winograd call will add to it.
void shortcut(const FpropArgs& a, void* out) {
  FpropArgs s;
  s.shape = a.shape;
  s.shape.H = a.short_H;
  s.shape.W = a.short_W;
  s.shape.C = a.short_C;
  s.shape.R = s.shape.S = 1;
  s.shape.stride = a.short_stride;
  s.shape.pad_left = s.shape.pad_right = s.shape.pad_top = s.shape.pad_bottom = 0;
  s.dtype = a.dtype;
  s.algo = Algo::direct;
  s.threads = a.threads;
  s.x = a.x_short;
  s.prologue = a.short_prologue;
  s.w = a.w_short;
  s.packed = a.packed_short;
  s.y = out;
  direct_fprop(s);
}

FilterView view(const PackArgs& a) {
  if (!a.dgrad) return fprop_view(a.w, a.K, a.C, a.R, a.S);
  return a.algo == Algo::direct ? dgrad_view(a.w, a.K, a.C, a.R, a.S) : rotated_view(a.w, a.K, a.C, a.R, a.S);
}

}  // namespace

void fprop(const FpropArgs& a) {
  if (a.algo == Algo::direct) return direct_fprop(a);
  const ConvShape& s = a.shape;
  void* addend = nullptr;
  if (a.x_short) {
    addend = a.y ? a.y : a.y_act;
    shortcut(a, addend);
  }
  WinogradCall call = {};
  call.algo = a.algo;
  call.threads = a.threads;
  call.input.data = a.x;
  call.input.dtype = a.dtype;
  call.input.N = s.N;
  call.input.H = s.H;
  call.input.W = s.W;
  call.input.C = s.C;
  call.input.pad_top = s.pad_top;
  call.input.pad_left = s.pad_left;
  call.input.prologue = a.prologue;
  call.filter = fprop_view(a.w, s.K, s.C, s.R, s.S);
  call.packed = a.packed;
  call.out_H = s.P;
  call.out_W = s.Q;
  call.out_C = s.K;
  call.epilogue = fprop_epilogue(a, addend);
  winograd(call, a.stats_y);
}

void dgrad(const DgradArgs& a) {
  if (a.algo == Algo::direct) return direct_dgrad(a);
  const ConvShape& s = a.shape;
  // The gradient of a stride-1 convolution is the convolution of dy, padded by 2 - pad, with the rotated filter.
  WinogradCall call = {};
  call.algo = a.algo;
  call.threads = a.threads;
  call.input.data = a.dy;
  call.input.dtype = a.dtype;
  call.input.N = s.N;
  call.input.H = s.P;
  call.input.W = s.Q;
  call.input.C = s.K;
  call.input.pad_top = s.R - 1 - s.pad_top;
  call.input.pad_left = s.S - 1 - s.pad_left;
  call.filter = rotated_view(a.w, s.K, s.C, s.R, s.S);
  call.packed = a.packed;
  call.out_H = s.H;
  call.out_W = s.W;
  call.out_C = s.C;
  call.epilogue = dgrad_epilogue(a);
  winograd(call, a.sums_g);
}

int64_t packed_size(const PackArgs& a) {
  return filter_floats(a.algo, view(a));
}

void pack(const PackArgs& a) {
  pack_filter(a.algo, view(a), a.out, a.threads);
}

}  // namespace WRN_ISA
}  // namespace wrn_fast
