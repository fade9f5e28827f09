// Pointers and a Plan to the argument structs of the kernels. Compiled once, for the baseline.
#include "plan.h"

#include <cmath>
#include <stdexcept>
#include <vector>

#include "elementwise.h"
#include "isa.h"

namespace wrn_fast {
namespace {

template <class T = float>
T* at(Pointer p) {
  return reinterpret_cast<T*>(p);
}

const Passes& passes() {
  static const Passes& chosen = [&]() -> const Passes& {
    const std::string name = kernels().name;
#if defined(WRN_HAVE_AVX512)
    if (name == "avx512") return avx512::passes;
#endif
#if defined(WRN_HAVE_AVX2)
    if (name == "avx2") return avx2::passes;
#endif
    return portable::passes;
  }();
  return chosen;
}

// BatchNorm with given statistics as the three arrays of a Prologue, with rstd. Absent statistics: no affine.
struct Affine {
  std::vector<float> scale, rstd;
  Prologue prologue;

  Affine(int64_t C, Pointer mean, Pointer var, Pointer gamma, Pointer beta, double eps, Act act, float slope) {
    prologue.act = act;
    prologue.slope = slope;
    if (!mean) return;
    const float *v = at<const float>(var), *g = at<const float>(gamma);
    scale.resize(static_cast<size_t>(C));
    rstd.resize(static_cast<size_t>(C));
    for (int64_t c = 0; c < C; ++c) {
      const double r = 1. / std::sqrt(static_cast<double>(v[c]) + eps);
      rstd[static_cast<size_t>(c)] = static_cast<float>(r);
      scale[static_cast<size_t>(c)] = static_cast<float>(g ? r * static_cast<double>(g[c]) : r);
    }
    prologue.center = at<const float>(mean);
    prologue.scale = scale.data();
    prologue.shift = at<const float>(beta);
  }
  // stats [2,C]: mean, variance.
  Affine(int64_t C, Pointer stats, Pointer gamma, Pointer beta, double eps, Act act, float slope)
      : Affine(C, stats, stats ? stats + static_cast<Pointer>(C) * sizeof(float) : 0, gamma, beta, eps, act, slope) {}
};

Weight filter(Pointer w, int code, int64_t C, int R, int S) {
  const FilterLayout layout = FilterLayout::from_code(code);
  Weight weight;
  weight.data = at<const void>(w);
  weight.dtype = layout.bf16 ? DType::bf16 : DType::f32;
  weight.stride_k = C * R * S;
  weight.stride_c = layout.channels_last ? 1 : R * S;
  weight.stride_r = layout.channels_last ? S * C : S;
  weight.stride_s = layout.channels_last ? C : 1;
  return weight;
}

}  // namespace

Act parse_act(const std::string& name) {
  if (name == "identity" || name == "none") return Act::identity;
  if (name == "relu") return Act::relu;
  if (name == "silu") return Act::silu;
  if (name == "leaky_relu") return Act::leaky_relu;
  throw std::invalid_argument("`act`: expected identity, relu, silu or leaky_relu, got " + name);
}

DropAt parse_drop_at(const std::string& name) {
  if (name == "none") return DropAt::none;
  if (name == "prologue") return DropAt::prologue;
  if (name == "output") return DropAt::output;
  if (name == "output_act") return DropAt::output_act;
  throw std::invalid_argument("`drop_at`: expected none, prologue, output or output_act, got " + name);
}

Dropout Plan::dropout(Pointer rng, bool wanted) const {
  Dropout d;
  if (!rng || !wanted || p <= 0.) return d;
  const int64_t* r = at<const int64_t>(rng);
  d.active = true;
  d.seed = static_cast<uint64_t>(r[0]);
  d.offset = static_cast<uint64_t>(r[1]);
  d.threshold = p < 1. ? static_cast<uint32_t>(p * 4294967296.) : 0xffffffffu;
  d.scale = p < 1. ? static_cast<float>(1. / (1. - p)) : 0.f;
  return d;
}

void Plan::fprop(int threads, const FpropPointers& t) const {
  const Affine affine(shape.C, t.mean, t.var, t.gamma, t.beta, eps, act, slope);
  const Affine affine_short(short_C, t.mean_short, t.var_short, t.gamma_short, t.beta_short, short_eps, short_act,
                            slope);
  FpropArgs args;
  args.shape = shape;
  args.dtype = dtype;
  args.algo = fprop_algo;
  args.threads = threads;
  args.x = at<const void>(t.x);
  args.prologue = affine.prologue;
  args.prologue.dropout = dropout(t.rng, drop_at == DropAt::prologue);
  args.w = filter(t.w, t.w_code, shape.C, shape.R, shape.S);
  args.packed = at<const float>(t.packed);
  args.bias = at<const float>(t.bias);
  args.residual = at<const void>(t.residual);
  if (t.x_short) {
    args.x_short = at<const void>(t.x_short);
    args.short_H = t.short_H;
    args.short_W = t.short_W;
    args.short_C = short_C;
    args.short_stride = short_stride;
    args.short_prologue = affine_short.prologue;
    args.w_short = filter(t.w_short, t.w_short_code, short_C, 1, 1);
    args.packed_short = at<const float>(t.packed_short);
  }
  args.drop_act = drop_at == DropAt::output_act;
  args.dropout = dropout(t.rng, args.drop_act || drop_at == DropAt::output);
  args.y = at<void>(t.y);
  args.stats_y = at<float>(t.stats_y);
  args.y_act = at<void>(t.y_act);
  args.act_out = act_out;
  args.slope_out = slope;
  args.out_scale = at<const float>(t.out_scale);
  args.out_shift = at<const float>(t.out_shift);
  kernels().fprop(args);
}

DgradArgs Plan::dgrad_args(int threads, Pointer dy, Pointer w, int w_code, Pointer packed, const Prologue& prologue,
                           Pointer rng, Pointer g) const {
  DgradArgs args;
  args.shape = shape;
  args.dtype = dtype;
  args.algo = dgrad_algo;
  args.threads = threads;
  args.dy = at<const void>(dy);
  args.w = filter(w, w_code, shape.C, shape.R, shape.S);
  args.packed = at<const float>(packed);
  args.prologue = prologue;
  args.prologue.dropout = dropout(rng, drop_at == DropAt::prologue);
  args.g = at<void>(g);
  return args;
}

void Plan::dgrad(int threads, Pointer dy, Pointer x, Pointer w, int w_code, Pointer packed, Pointer stats,
                 Pointer gamma, Pointer beta, Pointer rng, Pointer g, Pointer sums) const {
  const Affine affine(shape.C, stats, gamma, beta, eps, act, slope);
  DgradArgs args = dgrad_args(threads, dy, w, w_code, packed, affine.prologue, rng, g);
  args.x = at<const void>(x);
  args.rstd = affine.rstd.data();
  args.sums_g = at<float>(sums);
  kernels().dgrad(args);
}

void Plan::input_grad(int threads, Pointer dy, Pointer w, int w_code, Pointer packed, Pointer mask, Pointer scale,
                      Pointer rng, Pointer dx) const {
  Prologue prologue;
  prologue.act = act;
  prologue.slope = slope;
  DgradArgs args = dgrad_args(threads, dy, w, w_code, packed, prologue, rng, dx);
  args.mask = at<const uint8_t>(mask);
  args.out_scale = at<const float>(scale);
  kernels().dgrad(args);
}

void Plan::wgrad(int threads, Pointer dy, Pointer x, Pointer stats, Pointer gamma, Pointer beta, Pointer rng,
                 Pointer dw) const {
  const Affine affine(shape.C, stats, gamma, beta, eps, act, slope);
  WgradArgs args;
  args.shape = shape;
  args.dtype = dtype;
  args.algo = wgrad_algo;
  args.threads = threads;
  args.dy = at<const void>(dy);
  args.x = at<const void>(x);
  args.prologue = affine.prologue;
  args.prologue.dropout = dropout(rng, drop_at == DropAt::prologue);
  args.dw = at<float>(dw);
  kernels().wgrad(args);
}

void Plan::bn_bwd_apply(int threads, Pointer g, Pointer x, Pointer stats, Pointer gamma, Pointer sums,
                        Pointer dx) const {
  const Affine affine(shape.C, stats, gamma, 0, eps, act, slope);
  auto args = pass_args<BnBwdArgs>(threads);
  args.g = at<const void>(g);
  args.x = at<const void>(x);
  args.mean = at<const float>(stats);
  args.rstd = affine.rstd.data();
  args.scale = affine.scale.data();
  args.sums = at<const float>(sums);
  args.dx = at<void>(dx);
  passes().bn_bwd(args);
}

void Plan::act_mask(int threads, Pointer x, Pointer stats, Pointer gamma, Pointer beta, Pointer mask) const {
  const Affine affine(shape.C, stats, gamma, beta, eps, act, slope);
  auto args = pass_args<MaskArgs>(threads);
  args.x = at<const void>(x);
  args.prologue = affine.prologue;
  args.mask = at<uint8_t>(mask);
  passes().act_mask(args);
}

void Plan::channel_stats(int threads, Pointer x, Pointer stats) const {
  auto args = pass_args<StatsArgs>(threads);
  args.x = at<const void>(x);
  args.stats = at<float>(stats);
  passes().stats(args);
}

void Plan::drop(int threads, Pointer x, Pointer rng, Pointer y) const {
  auto args = pass_args<SourceArgs>(threads);
  args.x = at<const void>(x);
  args.prologue.dropout = dropout(rng, true);
  args.a = at<void>(y);
  passes().source(args);
}

PackArgs Plan::pack_args(bool for_dgrad) const {
  PackArgs args;
  args.algo = for_dgrad ? dgrad_algo : fprop_algo;
  args.dgrad = for_dgrad;
  args.C = shape.C;
  args.K = shape.K;
  args.R = shape.R;
  args.S = shape.S;
  return args;
}

PackArgs Plan::pack_args_short() const {
  PackArgs args;
  args.algo = Algo::direct;
  args.C = short_C;
  args.K = shape.K;
  args.R = args.S = 1;
  return args;
}

int64_t Plan::packed_size(bool for_dgrad) const {
  return kernels().packed_size(pack_args(for_dgrad));
}

int64_t Plan::packed_size_short() const {
  return kernels().packed_size(pack_args_short());
}

void Plan::pack(int threads, bool for_dgrad, Pointer w, int w_code, Pointer out) const {
  PackArgs args = pack_args(for_dgrad);
  args.w = filter(w, w_code, shape.C, shape.R, shape.S);
  args.threads = threads;
  args.out = at<float>(out);
  kernels().pack(args);
}

void Plan::pack_short(int threads, Pointer w, int w_code, Pointer out) const {
  PackArgs args = pack_args_short();
  args.w = filter(w, w_code, short_C, 1, 1);
  args.threads = threads;
  args.out = at<float>(out);
  kernels().pack(args);
}

}  // namespace wrn_fast
