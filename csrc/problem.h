// One operator call in plain C++: shapes, prologue, epilogue, weights. Pointers and sizes only, no torch.
//
// Letters: x [N,H,W,C] and y [N,P,Q,K] in memory order (channels_last), filter R x S. K is the number of output
// channels.
#pragma once

#include <cstdint>

namespace wrn_fast {

// f16 and f64 are of the CUDA kernels alone.
enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };
enum class Act : int32_t { identity = 0, relu = 1, silu = 2, leaky_relu = 3 };

// f4, f3 and f2 are Winograd F(4x4,3x3), F(3x3,3x3) and F(2x2,3x3): 3x3, stride 1 only. direct is an implicit GEMM: any
// filter and stride. f2s2 is polyphase Winograd for the fprop of a 3x3 filter at stride 2: 2x2 outputs from 25
// products.
enum class Algo : int32_t { f4 = 0, f2 = 1, direct = 2, f2s2 = 3, f3 = 4 };

// Philox4x32-10 over the 64-bit NHWC element index: keep = word >= threshold; kept values times scale = 1/(1-p).
// p = 1 is given as scale = 0.
struct Dropout {
  bool active = false;
  uint64_t seed = 0;
  uint64_t offset = 0;
  uint32_t threshold = 0;  // floor(p * 2^32)
  float scale = 1.f;
};

// a = dropout(act((x - center) * scale + shift)); the three arrays have one entry a channel and may be absent alone.
// center = mean, scale = gamma * rsqrt(var + eps), shift = beta: subtracting first keeps the digits of a channel whose
// mean is large beside its deviation.
struct Prologue {
  const float* center = nullptr;
  const float* scale = nullptr;
  const float* shift = nullptr;
  Act act = Act::identity;
  float slope = 0.f;
  Dropout dropout;
};

// w [K,C,R,S] in any dense layout; strides in elements.
struct Weight {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride_k = 0, stride_c = 0, stride_r = 0, stride_s = 0;
};

// Most taps of a filter, R * S.
constexpr int kTapsMax = 49;

struct ConvShape {
  int64_t N = 0, H = 0, W = 0, C = 0, K = 0, P = 0, Q = 0;
  int R = 3, S = 3, stride = 1;
  int pad_left = 0, pad_right = 0, pad_top = 0, pad_bottom = 0;
};

// static: an inline function that objects of several instruction sets share would be merged by the linker.
static inline ConvShape conv_shape(int64_t N, int64_t H, int64_t W, int64_t C, int64_t K, int R, int S, int stride,
                                   int pad_left, int pad_right, int pad_top, int pad_bottom) {
  ConvShape s;
  s.N = N;
  s.H = H;
  s.W = W;
  s.C = C;
  s.K = K;
  s.P = (H + pad_top + pad_bottom - R) / stride + 1;
  s.Q = (W + pad_left + pad_right - S) / stride + 1;
  s.R = R;
  s.S = S;
  s.stride = stride;
  s.pad_left = pad_left;
  s.pad_right = pad_right;
  s.pad_top = pad_top;
  s.pad_bottom = pad_bottom;
  return s;
}

// y = conv(prologue(x), w) [+ bias] [+ conv1x1(prologue_s(x_short), w_short)] [+ residual], then dropout, then the
// per-channel statistics of y as stored, then y_act = act_out(y * out_scale + out_shift).
struct FpropArgs {
  ConvShape shape;
  DType dtype = DType::f32;  // of x, residual, x_short, y, y_act
  Algo algo = Algo::f4;
  int threads = 1;
  const void* x = nullptr;
  Prologue prologue;
  Weight w;
  const float* packed = nullptr;  // from Kernels::pack for the same algo and direction; null: packed into scratch

  const float* bias = nullptr;     // [K]
  const void* residual = nullptr;  // [N,P,Q,K]

  const void* x_short = nullptr;  // [N,short_H,short_W,short_C]; output pixel (p,q) reads (p,q) * short_stride
  int64_t short_H = 0, short_W = 0, short_C = 0;
  int short_stride = 1;
  Prologue short_prologue;
  Weight w_short;                       // [K,short_C,1,1]
  const float* packed_short = nullptr;  // from Kernels::pack with Algo::direct

  Dropout dropout;  // of y, or of y_act when drop_act is set; element index over [N,P,Q,K]
  bool drop_act = false;
  void* y = nullptr;         // may be null when only y_act is wanted
  float* stats_y = nullptr;  // [2,K]: mean, biased variance; null: not wanted

  void* y_act = nullptr;
  Act act_out = Act::identity;
  float slope_out = 0.f;
  const float* out_scale = nullptr;  // [K], null: 1
  const float* out_shift = nullptr;  // [K], null: 0
};

// g = dropout'(conv_transpose(dy, w)) * act'(v) with v = (x - center) * scale + shift.
// sums_g = per channel (sum of g, sum of g * (x - center) * rstd), of g as stored.
struct DgradArgs {
  ConvShape shape;  // of the forward call: x [N,H,W,C], dy [N,P,Q,K]
  DType dtype = DType::f32;
  Algo algo = Algo::f4;
  int threads = 1;
  const void* dy = nullptr;
  Weight w;
  const float* packed = nullptr;
  const void* x = nullptr;  // null: no prologue, g = da
  Prologue prologue;
  const float* rstd = nullptr;  // [C], needed for sums_g
  // Instead of x, for a gradient by x alone: bits of act' (masks.h), and [C] that g is multiplied by. No sums then.
  const uint8_t* mask = nullptr;
  const float* out_scale = nullptr;
  void* g = nullptr;        // [N,H,W,C]
  float* sums_g = nullptr;  // [2,C]; null: not wanted
};

// dw = the gradient of y = conv(prologue(x), w) by w. f4: Winograd F(3x3,4x4), 3x3 at stride 1 only.
struct WgradArgs {
  ConvShape shape;
  DType dtype = DType::f32;  // of x and dy
  Algo algo = Algo::f4;
  int threads = 1;
  const void* dy = nullptr;  // [N,P,Q,K]
  const void* x = nullptr;   // [N,H,W,C]
  Prologue prologue;
  float* dw = nullptr;  // [K,R,S,C]
};

struct PackArgs {
  Algo algo = Algo::f4;
  bool dgrad = false;  // the rotated filter with C and K exchanged
  int64_t C = 0, K = 0;
  int R = 3, S = 3;
  Weight w;
  int threads = 1;
  float* out = nullptr;
};

}  // namespace wrn_fast
