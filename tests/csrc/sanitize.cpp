// Every kernel of csrc/cpu on small random problems, for a build with -fsanitize=address,undefined or thread: each
// tensor is an allocation of its own, of exactly the size that the contract promises, so one element too far is a
// report.
//
//   sanitize <cases> <seed>    exit 0 when all ran and agree with plain loops in double
//   sanitize plant             hands over an output that is one element short: has to be reported
//   sanitize shift             shifts by the width of a number: has to be reported
//   sanitize race              lets two threads add to one number: has to be reported
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/cpu/elementwise.h"
#include "../../csrc/cpu/isa.h"

using namespace wrn_fast;

namespace {

std::mt19937_64 generator;

int64_t pick(std::initializer_list<int64_t> of) {
  return of.begin()[generator() % of.size()];
}
bool coin() {
  return generator() % 2;
}

// n floats and no more, or n bf16 of the same values.
struct Tensor {
  std::unique_ptr<float[]> f32;
  std::unique_ptr<uint16_t[]> bf16;
  int64_t n;

  Tensor(int64_t n_, DType dtype, float low = -1.f, float high = 1.f) : n(n_) {
    std::uniform_real_distribution<float> draw(low, high);
    f32.reset(new float[n]);
    if (dtype == DType::bf16) bf16.reset(new uint16_t[n]);
    for (int64_t i = 0; i < n; ++i) {
      float v = draw(generator);
      if (bf16) {
        uint32_t bits;
        memcpy(&bits, &v, 4);
        bits &= 0xffff0000u;
        memcpy(&v, &bits, 4);
        bf16[i] = static_cast<uint16_t>(bits >> 16);
      }
      f32[i] = v;
    }
  }
  void* data() { return bf16 ? static_cast<void*>(bf16.get()) : f32.get(); }
  float at(int64_t i) const {
    if (!bf16) return f32[i];
    const uint32_t bits = static_cast<uint32_t>(bf16[i]) << 16;
    float v;
    memcpy(&v, &bits, 4);
    return v;
  }
};

double distance(const Tensor& got, const std::vector<double>& want) {
  double error = 0, size = 1e-30;
  for (int64_t i = 0; i < got.n; ++i) {
    const double d = static_cast<double>(got.at(i)) - want[i];
    error += d * d;
    size += want[i] * want[i];
  }
  return std::sqrt(error / size);
}

struct Problem {
  ConvShape s;
  DType dtype;
  Algo algo;
  int threads;

  Problem() {
    const bool winograd = coin();
    s.R = winograd ? 3 : static_cast<int>(pick({1, 2, 3, 5}));
    s.S = winograd ? 3 : static_cast<int>(pick({1, 3}));
    s.stride = winograd ? 1 : static_cast<int>(pick({1, 2, 3}));
    s.N = pick({1, 2, 3});
    s.C = pick({1, 3, 4, 16, 17, 31, 33, 40});
    s.K = pick({1, 2, 5, 16, 24, 33, 48});
    s.pad_left = static_cast<int>(pick({0, 1, 1, 2}));
    s.pad_right = static_cast<int>(pick({0, 1, 1, 2}));
    s.pad_top = static_cast<int>(pick({0, 1, 1, 2}));
    s.pad_bottom = static_cast<int>(pick({0, 1, 1, 2}));
    s.H = s.R + static_cast<int64_t>(generator() % 9);
    s.W = s.S + static_cast<int64_t>(generator() % 9);
    s.P = (s.H + s.pad_top + s.pad_bottom - s.R) / s.stride + 1;
    s.Q = (s.W + s.pad_left + s.pad_right - s.S) / s.stride + 1;
    dtype = coin() ? DType::f32 : DType::bf16;
    const Algo square[] = {Algo::f4, Algo::f3, Algo::f2, Algo::direct};
    algo = winograd ? square[generator() % 4] : Algo::direct;
    if (s.R == 3 && s.S == 3 && s.stride == 2 && coin()) algo = Algo::f2s2;
    threads = static_cast<int>(pick({1, 2, 3}));
  }
  // There is no polyphase form of the gradients.
  Algo backward(Algo winograd) const { return algo == Algo::direct || algo == Algo::f2s2 ? Algo::direct : winograd; }
  int64_t inputs() const { return s.N * s.H * s.W * s.C; }
  int64_t outputs() const { return s.N * s.P * s.Q * s.K; }
  int64_t weights() const { return s.K * s.C * s.R * s.S; }
  Weight weight(Tensor& w) const { return {w.f32.get(), DType::f32, s.C * s.R * s.S, s.R * s.S, s.S, 1}; }
  double bound() const { return dtype == DType::bf16 ? 1e-2 : 1e-5; }

  // f(output index, input index, weight index) for every product of the convolution.
  template <class F>
  void products(F f) const {
    for (int64_t n = 0; n < s.N; ++n)
      for (int64_t p = 0; p < s.P; ++p)
        for (int64_t q = 0; q < s.Q; ++q)
          for (int r = 0; r < s.R; ++r)
            for (int t = 0; t < s.S; ++t) {
              const int64_t h = p * s.stride + r - s.pad_top, w = q * s.stride + t - s.pad_left;
              if (h < 0 || h >= s.H || w < 0 || w >= s.W) continue;
              for (int64_t k = 0; k < s.K; ++k)
                for (int64_t c = 0; c < s.C; ++c)
                  f(((n * s.P + p) * s.Q + q) * s.K + k, ((n * s.H + h) * s.W + w) * s.C + c,
                    ((k * s.C + c) * s.R + r) * s.S + t);
            }
  }
};

struct Affine {
  Tensor center, scale, shift, rstd;
  explicit Affine(int64_t C)
      : center(C, DType::f32), scale(C, DType::f32, .5f, 2.f), shift(C, DType::f32), rstd(C, DType::f32, .5f, 2.f) {}
  Prologue prologue(Act act) const {
    Prologue p;
    p.center = center.f32.get();
    p.scale = scale.f32.get();
    p.shift = shift.f32.get();
    p.act = act;
    p.slope = .1f;
    return p;
  }
  double pre(const Tensor& x, int64_t i, int64_t c) const {
    return (static_cast<double>(x.at(i)) - static_cast<double>(center.f32[c])) * static_cast<double>(scale.f32[c]) +
           static_cast<double>(shift.f32[c]);
  }
};

std::unique_ptr<Tensor> pack(const Kernels& k, const Problem& p, Tensor& w, bool dgrad) {
  PackArgs args;
  args.algo = dgrad ? p.backward(p.algo) : p.algo;
  args.dgrad = dgrad;
  args.C = p.s.C;
  args.K = p.s.K;
  args.R = p.s.R;
  args.S = p.s.S;
  args.w = p.weight(w);
  args.threads = p.threads;
  std::unique_ptr<Tensor> out(new Tensor(k.packed_size(args), DType::f32));
  args.out = out->f32.get();
  k.pack(args);
  return out;
}

bool fprop(const Kernels& k, int64_t missing) {
  const Problem p;
  const ConvShape& s = p.s;
  Tensor x(p.inputs(), p.dtype), w(p.weights(), DType::f32), y(p.outputs() - missing, p.dtype);
  Tensor residual(p.outputs(), p.dtype), y_act(p.outputs(), p.dtype), bias(s.K, DType::f32), stats(2 * s.K, DType::f32);
  const int64_t short_C = pick({1, 5, 16, 20}), short_stride = pick({1, 2});
  const int64_t short_H = (s.P - 1) * short_stride + 1, short_W = (s.Q - 1) * short_stride + 1;
  Tensor x_short(s.N * short_H * short_W * short_C, p.dtype), w_short(s.K * short_C, DType::f32);
  const Affine affine(s.C);
  const bool with_prologue = coin(), with_residual = coin(), with_bias = coin(), with_short = coin(), with_act = coin();

  FpropArgs args;
  args.shape = s;
  args.dtype = p.dtype;
  args.algo = p.algo;
  args.threads = p.threads;
  args.x = x.data();
  if (with_prologue) args.prologue = affine.prologue(Act::relu);
  args.w = p.weight(w);
  const std::unique_ptr<Tensor> packed = coin() ? pack(k, p, w, false) : nullptr;
  args.packed = packed ? packed->f32.get() : nullptr;
  args.bias = with_bias ? bias.f32.get() : nullptr;
  args.residual = with_residual ? residual.data() : nullptr;
  if (with_short) {
    args.x_short = x_short.data();
    args.short_H = short_H;
    args.short_W = short_W;
    args.short_C = short_C;
    args.short_stride = static_cast<int>(short_stride);
    args.w_short = {w_short.f32.get(), DType::f32, short_C, 1, 1, 1};
  }
  args.y = y.data();
  args.stats_y = coin() ? stats.f32.get() : nullptr;
  args.y_act = with_act ? y_act.data() : nullptr;
  args.act_out = Act::silu;
  k.fprop(args);

  std::vector<double> want(static_cast<size_t>(p.outputs()), 0.);
  p.products([&](int64_t o, int64_t i, int64_t j) {
    const double a = with_prologue ? std::max(0., affine.pre(x, i, i % s.C)) : static_cast<double>(x.at(i));
    want[o] += a * static_cast<double>(w.f32[j]);
  });
  for (int64_t o = 0; o < p.outputs(); ++o) {
    const int64_t c = o % s.K, q = o / s.K % s.Q, row = o / s.K / s.Q % s.P, n = o / s.K / s.Q / s.P;
    if (with_bias) want[o] += static_cast<double>(bias.f32[c]);
    if (with_residual) want[o] += static_cast<double>(residual.at(o));
    for (int64_t i = 0; with_short && i < short_C; ++i)
      want[o] += static_cast<double>(
                     x_short.at(((n * short_H + row * short_stride) * short_W + q * short_stride) * short_C + i)) *
                 static_cast<double>(w_short.f32[c * short_C + i]);
  }
  return distance(y, want) <= p.bound();
}

bool dgrad(const Kernels& k) {
  const Problem p;
  const ConvShape& s = p.s;
  Tensor dy(p.outputs(), p.dtype), x(p.inputs(), p.dtype), w(p.weights(), DType::f32), g(p.inputs(), p.dtype);
  Tensor sums(2 * s.C, DType::f32);
  const Affine affine(s.C);
  DgradArgs args;
  args.shape = s;
  args.dtype = p.dtype;
  args.algo = p.backward(p.algo);
  args.threads = p.threads;
  args.dy = dy.data();
  args.w = p.weight(w);
  const std::unique_ptr<Tensor> packed = coin() ? pack(k, p, w, true) : nullptr;
  args.packed = packed ? packed->f32.get() : nullptr;
  args.x = x.data();
  args.prologue = affine.prologue(Act::leaky_relu);
  args.rstd = affine.rstd.f32.get();
  args.g = g.data();
  args.sums_g = coin() ? sums.f32.get() : nullptr;
  k.dgrad(args);

  std::vector<double> want(static_cast<size_t>(p.inputs()), 0.);
  p.products([&](int64_t o, int64_t i, int64_t j) {
    want[i] += static_cast<double>(dy.at(o)) * static_cast<double>(w.f32[j]);
  });
  for (int64_t i = 0; i < p.inputs(); ++i)
    if (affine.pre(x, i, i % s.C) <= 0) want[i] *= static_cast<double>(.1f);
  return distance(g, want) <= p.bound();
}

bool wgrad(const Kernels& k) {
  const Problem p;
  const ConvShape& s = p.s;
  Tensor dy(p.outputs(), p.dtype), x(p.inputs(), p.dtype), dw(p.weights(), DType::f32);
  const Affine affine(s.C);
  WgradArgs args;
  args.shape = s;
  args.dtype = p.dtype;
  args.algo = p.backward(Algo::f4);
  args.threads = p.threads;
  args.dy = dy.data();
  args.x = x.data();
  args.prologue = affine.prologue(Act::relu);
  args.dw = dw.f32.get();
  k.wgrad(args);

  std::vector<double> want(static_cast<size_t>(p.weights()), 0.);
  p.products([&](int64_t o, int64_t i, int64_t j) {
    const int64_t c = i % s.C, kk = o % s.K, tap = j % (s.R * s.S);
    want[(kk * s.R * s.S + tap) * s.C + c] += static_cast<double>(dy.at(o)) * std::max(0., affine.pre(x, i, c));
  });
  return distance(dw, want) <= p.bound();
}

bool passes(const Passes& passes) {
  const int64_t rows = 1 + static_cast<int64_t>(generator() % 300), C = pick({1, 3, 16, 31, 300});
  const DType dtype = coin() ? DType::f32 : DType::bf16;
  Tensor x(rows * C, dtype), g(rows * C, dtype), out(rows * C, dtype), sums(2 * C, DType::f32),
      stats(2 * C, DType::f32);
  const Affine affine(C);
  SourceArgs source;
  source.rows = rows;
  source.C = C;
  source.dtype = dtype;
  source.threads = 2;
  source.x = x.data();
  source.prologue = affine.prologue(Act::silu);
  source.prologue.dropout.active = coin();
  source.prologue.dropout.threshold = 1u << 30;
  source.prologue.dropout.scale = 4.f / 3.f;
  source.a = out.data();
  passes.source(source);
  StatsArgs moments;
  moments.rows = rows;
  moments.C = C;
  moments.dtype = dtype;
  moments.threads = 2;
  moments.x = x.data();
  moments.stats = stats.f32.get();
  passes.stats(moments);
  BnBwdArgs backward;
  backward.rows = rows;
  backward.C = C;
  backward.dtype = dtype;
  backward.threads = 2;
  backward.g = g.data();
  backward.x = x.data();
  backward.mean = affine.center.f32.get();
  backward.rstd = affine.rstd.f32.get();
  backward.scale = affine.scale.f32.get();
  backward.sums = sums.f32.get();
  backward.dx = out.data();
  passes.bn_bwd(backward);
  double mean = 0;
  for (int64_t r = 0; r < rows; ++r) mean += static_cast<double>(x.at(r * C)) / static_cast<double>(rows);
  return std::fabs(mean - static_cast<double>(stats.f32[0])) < 1e-5;
}

const Passes& passes_of(const char* name) {
#if defined(WRN_HAVE_AVX512)
  if (!strcmp(name, "avx512")) return avx512::passes;
#endif
#if defined(WRN_HAVE_AVX2)
  if (!strcmp(name, "avx2")) return avx2::passes;
#endif
  return portable::passes;
}

}  // namespace

int shift_by(int bits) {
  return 1 << bits;
}

int race() {
  int shared = 0;
#pragma omp parallel num_threads(2)
  for (int i = 0; i < 1000; ++i) ++shared;
  return shared;
}

int main(int argc, char** argv) {
  if (argc > 1 && !strcmp(argv[1], "shift")) return shift_by(30 + argc) & 1;
  if (argc > 1 && !strcmp(argv[1], "race")) return race() & 1;
  const Kernels& widest = kernels();
  if (argc > 1 && !strcmp(argv[1], "plant")) {
    generator.seed(1);
    for (int i = 0; i < 8; ++i) fprop(widest, 1);
    return 0;
  }
  const int cases = argc > 1 ? atoi(argv[1]) : 200;
  generator.seed(argc > 2 ? strtoull(argv[2], nullptr, 10) : 0);
  int wrong = 0, ran = 0;
  for (const Kernels* k : {&widest, kernels_named("portable")})
    for (int i = 0; i < cases / 2; ++i, ++ran) {
      const int kind = i % 4;
      const bool good = kind == 0   ? fprop(*k, 0)
                        : kind == 1 ? dgrad(*k)
                        : kind == 2 ? wgrad(*k)
                                    : passes(passes_of(k->name));
      if (!good) printf("%s: case %d of kind %d is wrong\n", k->name, i, kind), ++wrong;
    }
  printf("%d cases, %d wrong\n", ran, wrong);
  return wrong ? 1 : 0;
}
