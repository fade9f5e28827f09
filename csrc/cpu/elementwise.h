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

// y = dropout(y + bias + shortcut + residual) in place, then the statistics of y as stored, then
// y_act = act_out(y * out_scale + out_shift), dropped when drop_act is set.
struct EpilogueArgs {
    int64_t rows = 0, C = 0;
    DType dtype = DType::f32;
    int threads = 1;
    void* y = nullptr;
    const float* bias = nullptr;
    const void* shortcut = nullptr;
    const void* residual = nullptr;
    Dropout dropout;
    bool drop_act = false;
    float* stats = nullptr;  // [2,C]: mean, biased variance
    void* y_act = nullptr;
    Act act_out = Act::identity;
    float slope_out = 0.f;
    const float* out_scale = nullptr;
    const float* out_shift = nullptr;
};

// g = dropout'(da) * act'((x - center) * scale + shift); sums = (sum g, sum g * (x - center) * rstd) of g as stored.
struct SourceGradArgs {
    int64_t rows = 0, C = 0;
    DType dtype = DType::f32;
    int threads = 1;
    const void* da = nullptr;
    const void* x = nullptr;
    Prologue prologue;
    const float* rstd = nullptr;
    void* g = nullptr;  // may be da
    float* sums = nullptr;
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

struct Passes {
    void (*source)(const SourceArgs&);
    void (*epilogue)(const EpilogueArgs&);
    void (*source_grad)(const SourceGradArgs&);
    void (*bn_bwd)(const BnBwdArgs&);
    void (*stats)(const StatsArgs&);
};

namespace avx512 { extern const Passes passes; }
namespace avx2 { extern const Passes passes; }
namespace portable { extern const Passes passes; }

}  // namespace wrn_fast
