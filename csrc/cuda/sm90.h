// Host launchers of the Hopper (sm_90a) convolutions: pointers, sizes, a stream. No torch. Not run on a GPU yet.
//
// Activations are NHWC (channels_last) in bf16 or fp16, 16-byte aligned; sums are fp32. Every launcher runs on the
// current device and the given stream, allocates nothing, never synchronises, and may be captured on its first call.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "../problem.h"
#include "common.h"

namespace wrn_fast {

// How a convolution is cut. fetch9: 128 pixels, x fetched again for each tap; any filter, stride 1 or 2. shift3: 256
// pixels, x fetched once a filter column; 3x3 at stride 1, and its dgrad.
enum class Sm90Tile : int32_t { fetch9 = 0, shift3 = 1 };

// v = x * scale + shift, a = act(v): scale = gamma * rstd, shift = beta - mean * scale. scale null: no prologue (act is
// then identity).
struct Sm90Prologue {
  const float* scale = nullptr;  // [C]
  const float* shift = nullptr;  // [C]
  Act act = Act::identity;
  float slope = 0.f;
};

// How a call is launched.
struct Sm90Launch {
  // For small calls with fetch9: the reduction in `splits` pieces, see sm90_splits(). Scratch of sm90_partial_bytes();
  // sm90_counters() numbers that are 0 before the call, and again after it.
  int splits = 1;
  float* partials = nullptr;
  int* counters = nullptr;
  // The kernel may start, and fetch filters, while the one before it on the stream ends: that one must not write them.
  bool early = false;
};

// y = conv(prologue(x), w) [+ conv1x1(prologue_short(x_short), w_short)] [+ bias] [+ residual], dropped, rounded to
// dtype; partial moments of y as stored; y_act = act_out(y * out_scale + out_shift) from y before it is rounded,
// dropped.
struct Sm90Fprop : Sm90Launch {
  ConvShape shape;
  DType dtype = DType::bf16;  // bf16 or f16, of every activation and of the packed filters
  Sm90Tile tile = Sm90Tile::fetch9;
  const void* x = nullptr;  // [N,H,W,C]
  Sm90Prologue prologue;
  const void* w = nullptr;  // packed, see sm90_packed_bytes

  const void* x_short = nullptr;  // [N,short_H,short_W,short_C]; output pixel (p,q) reads (p,q) * short_stride
  int64_t short_H = 0, short_W = 0, short_C = 0;
  int short_stride = 1;
  Sm90Prologue short_prologue;
  const void* w_short = nullptr;  // packed as a 1x1 filter

  // Not null: x, x_short and their filters are in e4m3, and v = factor[k] * sums (without a prologue, C and short_C
  // multiples of 16); those of the shortcut times factor_short[k]. dtype is that of the rest.
  const float* factor = nullptr;        // [K]
  const float* factor_short = nullptr;  // [K]; needed with x_short

  const float* bias = nullptr;     // [K]
  const void* residual = nullptr;  // [N,P,Q,K]

  // Dropout of y, or of y_act where drop_act is set. rng is read when the kernel runs.
  cuda::Mask mask;
  bool drop_act = false;

  void* y = nullptr;      // [N,P,Q,K]; null when only y_act is wanted (no moments then)
  void* y_act = nullptr;  // [N,P,Q,K]; null: not wanted
  Act act_out = Act::identity;
  float slope_out = 0.f;
  const float* out_scale = nullptr;  // [K]; null: 1
  const float* out_shift = nullptr;  // [K]; null: 0

  // Null: not wanted. Part i of sm90_parts(), at most 64 pixels: counts[i] of them, their mean moments[i][0][k] and the
  // sum of squared distances from it moments[i][1][k]. A part may be empty (count 0, both 0). Merge in the order of i.
  float* counts = nullptr;   // [parts]
  float* moments = nullptr;  // [parts][2][K]
};

// g = conv_transpose(dy, w) * act'(v), v = x * scale + shift; partial sums of g and g * (x - mean) * rstd, g as stored.
struct Sm90Dgrad : Sm90Launch {
  ConvShape shape;  // of the forward call: x [N,H,W,C], dy [N,P,Q,K]
  DType dtype = DType::bf16;
  Sm90Tile tile = Sm90Tile::fetch9;
  const void* dy = nullptr;     // [N,P,Q,K]
  const void* w = nullptr;      // packed with `transpose`
  const void* x = nullptr;      // [N,H,W,C]; null: no prologue and no sums, g = da
  Sm90Prologue prologue;        // of the forward call; scale null: v = x
  const float* mean = nullptr;  // [C]; needed for sums
  const float* rstd = nullptr;  // [C]; needed for sums
  void* g = nullptr;            // [N,H,W,C]
  float* sums = nullptr;        // [parts][2][C]; null: not wanted. Add in the order of the parts.
};

// dw [K,R,S,C] fp32 = the gradient of y = conv(a, w) by w, a = prologue(x) made by the caller. Reduction split in a
// fixed way over pixels, slabs added in the order of the splits.
struct Sm90Wgrad {
  ConvShape shape;
  DType dtype = DType::bf16;
  const void* dy = nullptr;    // [N,P,Q,K]
  const void* x = nullptr;     // [N,H,W,C]: a
  float* workspace = nullptr;  // sm90_wgrad_workspace() bytes, 16-byte aligned; may be null if that is 0
  float* dw = nullptr;         // [K,R,S,C]
};

// Null if the kernels serve the call, else the reason as a sentence. `op` is fprop, fprop_fp8, dgrad or wgrad; a
// shortcut is asked about as the 1x1 convolution that it is.
const char* sm90_refuses(const char* op, const ConvShape& shape, DType dtype, Sm90Tile tile);

// Rows of `counts`, `moments`, `sums` of a call: fprop, or dgrad with dgrad = true.
int64_t sm90_parts(const ConvShape& shape, bool dgrad, Sm90Tile tile);

// Pieces that fill `multiprocessors` once; 1: the call is large enough. short_C: of the shortcut, 0 without.
int sm90_splits(const ConvShape& shape, int64_t short_C, bool dgrad, int multiprocessors, bool e4m3 = false);
int64_t sm90_partial_bytes(const ConvShape& shape, bool dgrad, int splits);
int64_t sm90_counters(const ConvShape& shape, bool dgrad);

// Packed filters. A filter [K][R][S][C] (dgrad: the same with C and K exchanged, `transpose`; taps keep their r and s)
// becomes, in this order, [K / block_k][ceil(C / 64)][S][R] blocks of block_k rows x 128 bytes: one row a k, 64
// channels, 16-byte columns XORed with k % 8 (TMA's 128-byte swizzle), zeros past C. sm90::packed_offset() in
// sm90_index.h gives the byte of (k, r, s, c). Both tiles read the same image. In e4m3 a row has 128 channels.
int sm90_block_k(int64_t K);
int64_t sm90_packed_bytes(int64_t K, int64_t C, int R, int S, bool e4m3 = false);

// Bytes for a device with that many multiprocessors; the launcher takes those of the current device.
int64_t sm90_wgrad_workspace(const ConvShape& shape, int multiprocessors);

cudaError_t sm90_fprop(const Sm90Fprop& args, cudaStream_t stream);
cudaError_t sm90_dgrad(const Sm90Dgrad& args, cudaStream_t stream);
cudaError_t sm90_wgrad(const Sm90Wgrad& args, cudaStream_t stream);

}  // namespace wrn_fast
