// sm90.h by its words, in plain loops: what the adapter may rely on, for tests of everything around the kernels. The
// kernels themselves run on the CPU in host_run.cpp.
#include "common_host.h"
#include "cuda/common_philox.h"
#include "cuda/sm90_plan.h"

namespace wrn_fast {
namespace {

using cuda::BFloat;
using cuda::E4M3;
using cuda::Half;
using cuda::narrow;
using cuda::widen;

float activate(float v, Act act, float slope) {
  if (act == Act::relu) return v < 0.f ? 0.f : v;
  if (act == Act::silu) return v / (1.f + std::exp(-v));
  if (act == Act::leaky_relu) return v > 0.f ? v : v * slope;
  return v;
}

float activate_backward(float g, float v, Act act, float slope) {
  const float s = 1.f / (1.f + std::exp(-v));
  if (act == Act::relu) return v <= 0.f ? 0.f : g;
  if (act == Act::silu) return g * (s * (1.f + v * (1.f - s)));
  if (act == Act::leaky_relu) return v > 0.f ? g : g * slope;
  return g;
}

// Element i of a tensor that is dropped.
float dropped(float v, const cuda::Mask& mask, int64_t i) {
  const PhiloxWords drawn =
      philox(static_cast<uint64_t>(i) >> 2, static_cast<uint64_t>(mask.rng[0]), static_cast<uint64_t>(mask.rng[1]));
  return v * (drawn.w[i & 3] >= mask.threshold ? static_cast<float>(mask.scale) : 0.f);
}

template <class T>
struct Image {
  const T* data;
  int64_t H, W, C;

  float operator()(int64_t n, int64_t h, int64_t w, int64_t c) const {
    return h < 0 || w < 0 || h >= H || w >= W ? 0.f : widen(data[((n * H + h) * W + w) * C + c]);
  }
};

// A packed filter [K, C, R, S], read through the index header.
template <class T>
struct Packed {
  const T* data;
  int64_t K, C;
  int R, S;

  float operator()(int64_t k, int r, int s, int64_t c) const {
    constexpr int bytes = sizeof(T);
    return widen(data[sm90::packed_offset(K, C, R, S, k, r, s, c, sm90::kRowBytes / bytes) / bytes]);
  }
};

// act(x * scale + shift), rounded as it is in shared memory; 0 outside the image.
template <class T>
float source(const Image<T>& x, const Sm90Prologue& p, int64_t n, int64_t h, int64_t w, int64_t c) {
  if (!p.scale) return x(n, h, w, c);
  if (h < 0 || w < 0 || h >= x.H || w >= x.W) return 0.f;
  return widen(narrow<T>(activate(x(n, h, w, c) * p.scale[c] + p.shift[c], p.act, p.slope)));
}

// O: of the operands of the products.
template <class T, class O>
void fprop(const Sm90Fprop& a) {
  const ConvShape& s = a.shape;
  const Image<O> x{static_cast<const O*>(a.x), s.H, s.W, s.C};
  const Image<O> x_short{static_cast<const O*>(a.x_short), a.short_H, a.short_W, a.short_C};
  const Packed<O> w{static_cast<const O*>(a.w), s.K, s.C, s.R, s.S};
  const Packed<O> w_short{static_cast<const O*>(a.w_short), s.K, a.short_C, 1, 1};
  const int64_t pixels = s.N * s.P * s.Q, parts = sm90::parts_of(s, false, a.tile);
  for (int64_t i = 0; i < pixels; ++i) {
    const int64_t n = i / (s.P * s.Q), p = i / s.Q % s.P, q = i % s.Q;
    for (int64_t k = 0; k < s.K; ++k) {
      float sum = 0.f;
      for (int r = 0; r < s.R; ++r)
        for (int t = 0; t < s.S; ++t)
          for (int64_t c = 0; c < s.C; ++c)
            sum += source(x, a.prologue, n, p * s.stride + r - s.pad_top, q * s.stride + t - s.pad_left, c) *
                   w(k, r, t, c);
      if (a.factor) sum *= a.factor[k];
      if (a.x_short)
        for (int64_t c = 0; c < a.short_C; ++c)
          sum += (a.factor ? a.factor_short[k] : 1.f) *
                 source(x_short, a.short_prologue, n, p * a.short_stride, q * a.short_stride, c) * w_short(k, 0, 0, c);
      if (a.bias) sum += a.bias[k];
      if (a.residual) sum += widen(static_cast<const T*>(a.residual)[i * s.K + k]);
      if (a.mask.rng && !a.drop_act) sum = dropped(sum, a.mask, i * s.K + k);
      if (a.y) static_cast<T*>(a.y)[i * s.K + k] = narrow<T>(sum);
      if (!a.y_act) continue;
      const float z = sum * (a.out_scale ? a.out_scale[k] : 1.f) + (a.out_shift ? a.out_shift[k] : 0.f);
      const float act = activate(z, a.act_out, a.slope_out);
      static_cast<T*>(a.y_act)[i * s.K + k] =
          narrow<T>(a.mask.rng && a.drop_act ? dropped(act, a.mask, i * s.K + k) : act);
    }
  }
  for (int64_t part = 0; a.moments && part < parts; ++part) {
    const int64_t begin = part * pixels / parts, end = (part + 1) * pixels / parts;
    a.counts[part] = static_cast<float>(end - begin);
    for (int64_t k = 0; k < s.K; ++k) {
      double mean = 0., squares = 0.;
      const T* y = static_cast<const T*>(a.y) + k;
      for (int64_t i = begin; i < end; ++i) mean += widen(y[i * s.K]) / static_cast<double>(end - begin);
      for (int64_t i = begin; i < end; ++i) squares += (widen(y[i * s.K]) - mean) * (widen(y[i * s.K]) - mean);
      a.moments[part * 2 * s.K + k] = static_cast<float>(mean);
      a.moments[(part * 2 + 1) * s.K + k] = static_cast<float>(squares);
    }
  }
}

template <class T>
void dgrad(const Sm90Dgrad& a) {
  const ConvShape& s = a.shape;
  const Image<T> dy{static_cast<const T*>(a.dy), s.P, s.Q, s.K}, x{static_cast<const T*>(a.x), s.H, s.W, s.C};
  const Packed<T> w{static_cast<const T*>(a.w), s.C, s.K, s.R, s.S};
  T* g = static_cast<T*>(a.g);
  const int64_t pixels = s.N * s.H * s.W, parts = sm90::parts_of(s, true, a.tile);
  for (int64_t i = 0; i < pixels; ++i) {
    const int64_t n = i / (s.H * s.W), h = i / s.W % s.H, column = i % s.W;
    for (int64_t c = 0; c < s.C; ++c) {
      float sum = 0.f;
      for (int r = 0; r < s.R; ++r)
        for (int t = 0; t < s.S; ++t) {
          const int64_t p = h + s.pad_top - r, q = column + s.pad_left - t;
          if (p % s.stride || q % s.stride) continue;
          for (int64_t k = 0; k < s.K; ++k) sum += dy(n, p / s.stride, q / s.stride, k) * w(c, r, t, k);
        }
      if (a.x) {
        const float v = x(n, h, column, c);
        const float normal = a.prologue.scale ? v * a.prologue.scale[c] + a.prologue.shift[c] : v;
        sum = activate_backward(sum, normal, a.prologue.act, a.prologue.slope);
      }
      g[i * s.C + c] = narrow<T>(sum);
    }
  }
  for (int64_t part = 0; a.sums && part < parts; ++part)
    for (int64_t c = 0; c < s.C; ++c) {
      double sum = 0., product = 0.;
      for (int64_t i = part * pixels / parts; i < (part + 1) * pixels / parts; ++i) {
        const double v = widen(g[i * s.C + c]);
        sum += v;
        product += v * (widen(x.data[i * s.C + c]) - a.mean[c]) * a.rstd[c];
      }
      a.sums[part * 2 * s.C + c] = static_cast<float>(sum);
      a.sums[(part * 2 + 1) * s.C + c] = static_cast<float>(product);
    }
}

template <class T>
void wgrad(const Sm90Wgrad& a) {
  const ConvShape& s = a.shape;
  const Image<T> dy{static_cast<const T*>(a.dy), s.P, s.Q, s.K}, x{static_cast<const T*>(a.x), s.H, s.W, s.C};
  for (int64_t k = 0; k < s.K; ++k)
    for (int r = 0; r < s.R; ++r)
      for (int t = 0; t < s.S; ++t)
        for (int64_t c = 0; c < s.C; ++c) {
          float sum = 0.f;
          for (int64_t n = 0; n < s.N; ++n)
            for (int64_t p = 0; p < s.P; ++p)
              for (int64_t q = 0; q < s.Q; ++q)
                sum += dy(n, p, q, k) * x(n, p * s.stride + r - s.pad_top, q * s.stride + t - s.pad_left, c);
          a.dw[((k * s.R + r) * s.S + t) * s.C + c] = sum;
        }
}

}  // namespace

const char* sm90_refuses(const char* op, const ConvShape& shape, DType dtype, Sm90Tile tile) {
  return sm90::refuses(op, shape, dtype, tile);
}
int64_t sm90_parts(const ConvShape& shape, bool dgrad, Sm90Tile tile) {
  return sm90::parts_of(shape, dgrad, tile);
}
int sm90_block_k(int64_t K) {
  return sm90::block_k_of(K);
}
int64_t sm90_packed_bytes(int64_t K, int64_t C, int R, int S, bool e4m3) {
  return sm90::packed_bytes(K, C, R, S, e4m3);
}
int sm90_splits(const ConvShape& shape, int64_t short_C, bool dgrad, int multiprocessors, bool e4m3) {
  return sm90::splits_of(shape, short_C, dgrad, multiprocessors, e4m3);
}
int64_t sm90_partial_bytes(const ConvShape& shape, bool dgrad, int splits) {
  return sm90::partial_bytes(shape, dgrad, splits);
}
int64_t sm90_counters(const ConvShape& shape, bool dgrad) {
  return sm90::split_blocks(shape, dgrad);
}
int64_t sm90_wgrad_workspace(const ConvShape& shape, int) {
  return shape.K * shape.R * shape.S * shape.C * 4;
}

cudaError_t sm90_fprop(const Sm90Fprop& args, cudaStream_t) {
  const bool bf16 = args.dtype == DType::bf16;
  if (args.factor) {
    bf16 ? fprop<BFloat, E4M3>(args) : fprop<Half, E4M3>(args);
  } else {
    bf16 ? fprop<BFloat, BFloat>(args) : fprop<Half, Half>(args);
  }
  return cudaSuccess;
}
cudaError_t sm90_dgrad(const Sm90Dgrad& args, cudaStream_t) {
  args.dtype == DType::bf16 ? dgrad<BFloat>(args) : dgrad<Half>(args);
  return cudaSuccess;
}
cudaError_t sm90_wgrad(const Sm90Wgrad& args, cudaStream_t) {
  if (!args.workspace) return cudaErrorInvalidValue;
  args.dtype == DType::bf16 ? wgrad<BFloat>(args) : wgrad<Half>(args);
  return cudaSuccess;
}

}  // namespace wrn_fast
