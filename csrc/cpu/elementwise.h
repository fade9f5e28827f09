// The passes over whole tensors that stand between convolutions: argument structs and the table entries.
//
// A tensor is [rows, C] in memory (channels_last: rows = N*H*W), fp32 or bf16; arithmetic is fp32, sums are double.
// Work is cut in chunks by (rows, C) alone and partial sums merge in chunk order: bits do not depend on `threads`.
#pragma once

#include "../problem.h"

namespace wrn_fast {

// a = dropout(act((x - center) * scale + shift)).
struct SourceArgs {
  int64_t rows = 0, C = 0;
  DType dtype = DType::f32;
  int threads = 1;
  const void* x = nullptr;
  Prologue prologue;
  void* a = nullptr;
};

// dx = scale * (g - sums[0]/rows - (x - mean) * rstd * sums[1]/rows); without sums, dx = scale * g.
struct BnBwdArgs {
  int64_t rows = 0, C = 0;
  DType dtype = DType::f32;
  int threads = 1;
  const void* g = nullptr;
  const void* x = nullptr;
  const float* mean = nullptr;
  const float* rstd = nullptr;
  const float* scale = nullptr;  // gamma * rstd
  const float* sums = nullptr;
  void* dx = nullptr;  // may be g
};

// stats [2,C] = mean and biased variance of x. Each block of rows is centred on its own mean, and blocks merge as
// (count, mean, M2) in double (Chan, Golub, LeVeque 1979): a mean of 1e4 beside a deviation of 1 costs no digits.
struct StatsArgs {
  int64_t rows = 0, C = 0;
  DType dtype = DType::f32;
  int threads = 1;
  const void* x = nullptr;
  float* stats = nullptr;
};

// mask = bits of act'((x - center) * scale + shift) for act in {relu, leaky_relu}.
struct MaskArgs {
  int64_t rows = 0, C = 0;
  DType dtype = DType::f32;
  int threads = 1;
  const void* x = nullptr;
  Prologue prologue;
  uint8_t* mask = nullptr;
};

struct Passes {
  void (*source)(const SourceArgs&);
  void (*bn_bwd)(const BnBwdArgs&);
  void (*stats)(const StatsArgs&);
  void (*act_mask)(const MaskArgs&);
};

namespace avx512 {
extern const Passes passes;
}
namespace avx2 {
extern const Passes passes;
}
namespace portable {
extern const Passes passes;
}

}  // namespace wrn_fast
