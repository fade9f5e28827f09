// One ConvProblem on the C++ side: every scalar of an operator call, and the calls that add pointers to it.
//
// Immutable after construction, so threads share it. Pointers arrive as integers, 0 for an absent tensor.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../problem.h"

namespace wrn_fast {

using Pointer = uintptr_t;

enum class DropAt : int32_t { none, prologue, output, output_act };

// How a filter lies in memory: [K,C,R,S] row-major, or channels_last (KRSC).
struct FilterLayout {
  bool channels_last = false;
  bool bf16 = false;

  // Bit 0: channels_last, bit 1: bf16.
  static FilterLayout from_code(int code) { return {(code & 1) != 0, (code & 2) != 0}; }
};

// The tensors of one fprop. BatchNorm's statistics are two arrays: running_mean and running_var, or the halves of
// [2,C].
struct FpropPointers {
  Pointer x, w;
  int w_code;
  Pointer packed, mean, var, gamma, beta, bias, residual;
  Pointer x_short;
  int64_t short_H, short_W;
  Pointer w_short;
  int w_short_code;
  Pointer packed_short, mean_short, var_short, gamma_short, beta_short;
  Pointer rng, out_scale, out_shift;
  Pointer y, stats_y, y_act;
};

struct Plan {
  ConvShape shape;
  DType dtype = DType::f32;
  Act act = Act::identity, short_act = Act::identity, act_out = Act::identity;
  float slope = 0.f;
  double eps = 0., short_eps = 0., p = 0.;
  DropAt drop_at = DropAt::none;
  int64_t short_C = 0;
  int short_stride = 1;
  Algo fprop_algo = Algo::direct, dgrad_algo = Algo::direct, wgrad_algo = Algo::direct;

  void fprop(int threads, const FpropPointers& t) const;
  void dgrad(int threads, Pointer dy, Pointer x, Pointer w, int w_code, Pointer packed, Pointer stats, Pointer gamma,
             Pointer beta, Pointer rng, Pointer g, Pointer sums) const;
  void wgrad(int threads, Pointer dy, Pointer x, Pointer stats, Pointer gamma, Pointer beta, Pointer rng,
             Pointer dw) const;
  void bn_bwd_apply(int threads, Pointer g, Pointer x, Pointer stats, Pointer gamma, Pointer sums, Pointer dx) const;
  void act_mask(int threads, Pointer x, Pointer stats, Pointer gamma, Pointer beta, Pointer mask) const;
  void input_grad(int threads, Pointer dy, Pointer w, int w_code, Pointer packed, Pointer mask, Pointer scale,
                  Pointer rng, Pointer dx) const;
  void channel_stats(int threads, Pointer x, Pointer stats) const;
  void drop(int threads, Pointer x, Pointer rng, Pointer y) const;

  // Packing of the main filter for fprop or dgrad, or of the shortcut's; floats of it, and the pack itself.
  int64_t packed_size(bool for_dgrad) const;
  int64_t packed_size_short() const;
  void pack(int threads, bool for_dgrad, Pointer w, int w_code, Pointer out) const;
  void pack_short(int threads, Pointer w, int w_code, Pointer out) const;

  Dropout dropout(Pointer rng, bool wanted) const;
  int64_t source_rows() const { return shape.N * shape.H * shape.W; }

 private:
  // What the arguments of every pass over a whole tensor begin with.
  template <class Args>
  Args pass_args(int threads) const {
    Args args;
    args.rows = source_rows();
    args.C = shape.C;
    args.dtype = dtype;
    args.threads = threads;
    return args;
  }
  DgradArgs dgrad_args(int threads, Pointer dy, Pointer w, int w_code, Pointer packed, const Prologue& prologue,
                       Pointer rng, Pointer g) const;
  PackArgs pack_args(bool for_dgrad) const;
  PackArgs pack_args_short() const;
};

// fprops in a row with nothing between them: a run of blocks in inference.
class Chain {
 public:
  void add(const Plan& plan, int threads, const FpropPointers& t) { steps_.push_back({plan, threads, t}); }
  void run() const {
    for (const Step& step : steps_) step.plan.fprop(step.threads, step.pointers);
  }

 private:
  struct Step {
    Plan plan;
    int threads;
    FpropPointers pointers;
  };
  std::vector<Step> steps_;
};

// Throws std::invalid_argument for an unknown name.
Act parse_act(const std::string& name);
DropAt parse_drop_at(const std::string& name);

}  // namespace wrn_fast
