// Host launchers of the kernels that are bound by memory: right on compute capability 7.5 and later. No CUDA header, so
// that module.cpp and the tests include it alone.
//
// Pointers are device memory. Each launcher queues its kernels on `stream` (a cudaStream_t), waits for nothing,
// allocates nothing, and throws Error where a launch fails. What a launcher does depends on shapes only, so its bits
// are the same on every GPU.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../problem.h"

namespace wrn_fast {
namespace cuda {

using Stream = void*;

// CUDA's word for what went wrong.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}
// Statistics, sums and arithmetic: float32, float64 for float64.
constexpr DType wide_of(DType dtype) {
  return dtype == DType::f64 ? DType::f64 : DType::f32;
}

// Tensors of `rows` = N*H*W pixels of C channels, NHWC without holes.
struct Rows {
  DType dtype = DType::f32;
  int64_t rows = 0;
  int C = 0;
};

// Philox4x32-10 (wrn_fast/random.py): element i takes word i & 3 of the block with key `rng[0]` and counter
// (i >> 2, rng[1]), is kept when word >= threshold, and then multiplied by `scale`.
struct Mask {
  const int64_t* rng = nullptr;  // [2] on the device: a graph replays new masks; null: no dropout
  uint32_t threshold = 0;        // floor(p * 2^32)
  double scale = 1;              // 1 / (1 - p); 0 for p = 1
};

// BatchNorm with given statistics. Vectors are of the wide dtype.
struct Norm {
  const void* stats = nullptr;  // [2, C]: mean, biased variance; null: no BatchNorm
  const void* gamma = nullptr;  // [C]; null: 1
  const void* beta = nullptr;   // [C]; null: 0
  double eps = 0;
};

// y = act(bn(x)) * mask / (1 - p), written once instead of made nine times in a convolution. Reads x, writes y.
void apply(const Rows& shape, const void* x, const Norm& norm, Act act, double slope, const Mask& mask, void* y,
           Stream stream);

// dx = gamma * rstd * (g - sums[0]/m - xhat * sums[1]/m), m = rows; without sums dx = gamma * rstd * g.
// Reads g and x, writes dx.
void bn_bwd_apply(const Rows& shape, const void* g, const void* x, const Norm& norm, const void* sums, void* dx,
                  Stream stream);

// stats [2, C]: mean and biased variance of x. Reads x once; `workspace` holds channel_stats_workspace(shape) bytes.
int64_t channel_stats_workspace(const Rows& shape);
void channel_stats(const Rows& shape, const void* x, void* stats, void* workspace, Stream stream);

// For what a convolution's epilogue does not do itself:
// g = da * mask / (1 - p) * act'(bn(x)), and sums [2, C] of g and g * xhat, of g as stored; null: not wanted.
// Reads da and x, writes g, which may be da.
int64_t act_backward_workspace(const Rows& shape);
void act_backward(const Rows& shape, const void* da, const void* x, const Norm& norm, Act act, double slope,
                  const Mask& mask, void* g, void* sums, void* workspace, Stream stream);

// bits [rows, ceil(C / 8)]: bit c % 8 of byte c / 8 is act'(bn(x)) == 1, of relu or leaky_relu.
void act_mask(const Rows& shape, const void* x, const Norm& norm, Act act, void* bits, Stream stream);

// g = da * mask / (1 - p) * (bit ? 1 : slope) * scale[c]; null bits: all set, null scale [C]: 1. g may be da.
void mask_backward(const Rows& shape, const void* da, const void* bits, const void* scale, double slope,
                   const Mask& mask, void* g, Stream stream);

// BatchNorm with given statistics as a table [4, C] of the wide dtype: scale, shift, mean, rstd, so that
// bn(x) = x * scale + shift.
struct Fold {
  const void *mean = nullptr, *var = nullptr;
  const void *gamma = nullptr, *beta = nullptr;  // null: 1, 0
  DType stats_dtype = DType::f32, affine_dtype = DType::f32;
  int C = 0;
  double eps = 0;
  void* table = nullptr;
  void* stats = nullptr;  // [2, C], the same mean and variance in the wide dtype; null: not wanted
};

// As many of them in one launch as its arguments have room for.
constexpr int kMostFolds = 48;
void fold_norms(const Fold* folds, int count, DType wide, Stream stream);

// stats [2, C]: mean and biased variance, from the moments [parts, 2, C] (mean, M2) of parts of counts[part] rows each.
int64_t merge_moments_workspace(DType wide, int64_t parts, int C);
void merge_moments(DType wide, int C, const void* counts, const void* moments, int64_t parts, void* stats,
                   void* workspace, Stream stream);

// A filter [K, C, R, S] of f32 or of the packed dtype, and its packed image (sm90.h) in rows of 128 bytes: out_rows
// rows, the ones past K zero, in blocks of block_rows; `transpose` exchanges K and C.
struct Filter {
  Weight w;
  int K = 0, C = 0, R = 0, S = 0;
  bool transpose = false;
  int out_rows = 0, block_rows = 0;
  void* packed = nullptr;
  // pack_samples_bytes(), kept with `packed`: some elements of each tile as they were. A tile whose elements still are
  // so is not packed again, unless `all`. Null: pack in any case.
  void* samples = nullptr;
  const float* scale = nullptr;  // [K], of a pack in e4m3: what a row is divided by
};

// Packs filters of one dtype (bf16, f16), as many of them in one launch as its arguments have room for.
constexpr int kFilterSamples = 16;  // a tile of 64 x 64
constexpr int kMostFilters = 32;
int64_t pack_samples_bytes(const Weight& w, int K, int C, int R, int S);
void pack_filters(const Filter* filters, int count, DType dtype, bool all, Stream stream);

// Operands in e4m3, whose largest number is 448. Of a dense filter: scale[k] = max |w[k]| / 448, 1 where that is 0;
// factor[k] = scale[k] * amax / 448; and the packed image of w[k] / scale[k] in rows of 128 channels.
void filter_scales(const Filter& filter, const float* amax, float* scale, float* factor, Stream stream);
void pack_filter_e4m3(const Filter& filter, Stream stream);
// y [rows, C] in e4m3 = act(bn(x)) * mask / (1 - p) * 448 / amax; beyond 448 it is 448. C a multiple of 16, x of 16
// bits.
void quantize(const Rows& shape, const void* x, const Norm& norm, Act act, double slope, const Mask& mask,
              const float* amax, void* y, Stream stream);

// feat [N, C] = mean over the image of act(bn(y)), out [N, K] = f w^T + bias, or |f / max(|f|, 1e-12) w^T + bias| where
// `cosine`; f is feat before it is rounded. Reads y [N, pixels, C] once for 64 classes.
constexpr int kMostFeatures = 2048;  // C
struct Head {
  DType dtype = DType::f32, w_dtype = DType::f32;  // of y, out, feat; of w
  int64_t N = 0;
  int pixels = 0, C = 0, K = 0;
  const void* y = nullptr;
  Norm norm;
  Act act = Act::identity;
  double slope = 0;
  const void* w = nullptr;     // [K, C]
  const void* bias = nullptr;  // [K] of the wide dtype; null: 0
  bool cosine = false;
  void *out = nullptr, *feat = nullptr;
};
void head(const Head& h, Stream stream);

// g = dfeat[n, c] / pixels * act'(bn(y)), sums [2, C] of g and g * xhat,
// dy = gamma * rstd * (g - sums[0]/m - xhat * sums[1]/m), m = N * pixels, where `batch`, else gamma * rstd * g; without
// BatchNorm dy = g. Reads y twice where there are sums, which are needed for `batch` and else may be null.
struct HeadBackward {
  DType dtype = DType::f32;  // of y and dy; dfeat [N, C] is of the wide dtype
  int64_t N = 0;
  int pixels = 0, C = 0;
  const void *dfeat = nullptr, *y = nullptr;
  Norm norm;
  Act act = Act::identity;
  double slope = 0;
  bool batch = false;
  void *dy = nullptr, *sums = nullptr, *workspace = nullptr;
};
int64_t head_bwd_workspace(DType dtype, int64_t N, int pixels, int C);
void head_bwd(const HeadBackward& h, Stream stream);

// out [count] of `dtype` = the sums over from [slabs, count] of the wide dtype, in index order: of a few large slabs
// directly, of many small ones 64 at a time.
int64_t add_slabs_workspace(DType wide, int64_t slabs, int64_t count);
void add_slabs(DType wide, const void* from, int64_t slabs, int64_t count, DType dtype, void* out, void* workspace,
               Stream stream);

}  // namespace cuda
}  // namespace wrn_fast
