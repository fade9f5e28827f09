// wrn_fast._cpu: pointers as integers and sizes in, nothing of torch. wrn_fast/backends/cpu.py checks tensors and keeps
// them alive; the interpreter lock is released inside every call.
#include <pybind11/pybind11.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "elementwise.h"
#include "isa.h"

namespace py = pybind11;

namespace wrn_fast {
namespace {

using Pointer = uintptr_t;

template <class T = float>
T* at(Pointer p) {
    return reinterpret_cast<T*>(p);
}

const Passes& passes() {
    const std::string name = kernels().name;
#if defined(WRN_HAVE_AVX512)
    if (name == "avx512") return avx512::passes;
#endif
#if defined(WRN_HAVE_AVX2)
    if (name == "avx2") return avx2::passes;
#endif
    return portable::passes;
}

Act parse_act(const std::string& name) {
    if (name == "identity" || name == "none") return Act::identity;
    if (name == "relu") return Act::relu;
    if (name == "silu") return Act::silu;
    if (name == "leaky_relu") return Act::leaky_relu;
    throw std::invalid_argument("`act`: expected identity, relu, silu or leaky_relu, got " + name);
}

// BatchNorm of statistics [2,C] as the three arrays of a Prologue, with rstd. Absent statistics: no affine.
struct Affine {
    std::vector<float> scale, rstd;
    Prologue prologue;

    Affine(int64_t C, Pointer stats, Pointer gamma, Pointer beta, double eps, Act act, float slope) {
        prologue.act = act;
        prologue.slope = slope;
        if (!stats) return;
        const float *s = at<const float>(stats), *g = at<const float>(gamma);
        scale.resize(static_cast<size_t>(C));
        rstd.resize(static_cast<size_t>(C));
        for (int64_t c = 0; c < C; ++c) {
            const double r = 1. / std::sqrt(static_cast<double>(s[C + c]) + eps);
            rstd[static_cast<size_t>(c)] = static_cast<float>(r);
            scale[static_cast<size_t>(c)] = static_cast<float>(g ? r * static_cast<double>(g[c]) : r);
        }
        prologue.center = s;
        prologue.scale = scale.data();
        prologue.shift = at<const float>(beta);
    }
};

// One ConvProblem: everything but pointers and the thread count. Immutable after construction, shared by threads.
struct Plan {
    ConvShape shape;
    DType dtype;
    Act act, short_act, act_out;
    float slope;
    double eps, short_eps, p;
    std::string drop_at;
    int64_t short_C;
    int short_stride;

    Dropout dropout(Pointer rng, bool wanted) const {
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
    bool drops_output() const { return drop_at == "output" || drop_at == "output_act"; }
    int64_t source_rows() const { return shape.N * shape.H * shape.W; }
    int64_t output_rows() const { return shape.N * shape.P * shape.Q; }

    void source(int threads, Pointer x, Pointer stats, Pointer gamma, Pointer beta, Pointer rng, Pointer a) const {
        Affine affine(shape.C, stats, gamma, beta, eps, act, slope);
        SourceArgs args;
        args.rows = source_rows();
        args.C = shape.C;
        args.dtype = dtype;
        args.threads = threads;
        args.x = at<const void>(x);
        args.prologue = affine.prologue;
        args.prologue.dropout = dropout(rng, drop_at == "prologue");
        args.a = at<void>(a);
        passes().source(args);
    }

    void source_short(int threads, int64_t rows, Pointer x, Pointer stats, Pointer gamma, Pointer beta, Pointer a) const {
        Affine affine(short_C, stats, gamma, beta, short_eps, short_act, slope);
        SourceArgs args;
        args.rows = rows;
        args.C = short_C;
        args.dtype = dtype;
        args.threads = threads;
        args.x = at<const void>(x);
        args.prologue = affine.prologue;
        args.a = at<void>(a);
        passes().source(args);
    }

    void epilogue(int threads, Pointer y, Pointer bias, Pointer shortcut, Pointer residual, Pointer rng, Pointer stats_y,
                  Pointer y_act, Pointer out_scale, Pointer out_shift) const {
        EpilogueArgs args;
        args.rows = output_rows();
        args.C = shape.K;
        args.dtype = dtype;
        args.threads = threads;
        args.y = at<void>(y);
        args.bias = at<const float>(bias);
        args.shortcut = at<const void>(shortcut);
        args.residual = at<const void>(residual);
        args.dropout = dropout(rng, drops_output());
        args.drop_act = drop_at == "output_act";
        args.stats = at<float>(stats_y);
        args.y_act = at<void>(y_act);
        args.act_out = act_out;
        args.slope_out = slope;
        args.out_scale = at<const float>(out_scale);
        args.out_shift = at<const float>(out_shift);
        passes().epilogue(args);
    }

    void source_grad(int threads, Pointer da, Pointer x, Pointer stats, Pointer gamma, Pointer beta, Pointer rng, Pointer g,
                     Pointer sums) const {
        Affine affine(shape.C, stats, gamma, beta, eps, act, slope);
        SourceGradArgs args;
        args.rows = source_rows();
        args.C = shape.C;
        args.dtype = dtype;
        args.threads = threads;
        args.da = at<const void>(da);
        args.x = at<const void>(x);
        args.prologue = affine.prologue;
        args.prologue.dropout = dropout(rng, drop_at == "prologue");
        args.rstd = affine.rstd.data();
        args.g = at<void>(g);
        args.sums = at<float>(sums);
        passes().source_grad(args);
    }

    void bn_bwd_apply(int threads, Pointer g, Pointer x, Pointer stats, Pointer gamma, Pointer sums, Pointer dx) const {
        Affine affine(shape.C, stats, gamma, 0, eps, act, slope);
        BnBwdArgs args;
        args.rows = source_rows();
        args.C = shape.C;
        args.dtype = dtype;
        args.threads = threads;
        args.g = at<const void>(g);
        args.x = at<const void>(x);
        args.mean = at<const float>(stats);
        args.rstd = affine.rstd.data();
        args.scale = affine.scale.data();
        args.sums = at<const float>(sums);
        args.dx = at<void>(dx);
        passes().bn_bwd(args);
    }

    void channel_stats(int threads, Pointer x, Pointer stats) const {
        StatsArgs args;
        args.rows = source_rows();
        args.C = shape.C;
        args.dtype = dtype;
        args.threads = threads;
        args.x = at<const void>(x);
        args.stats = at<float>(stats);
        passes().stats(args);
    }

    void drop(int threads, Pointer x, Pointer rng, Pointer y) const {
        SourceArgs args;
        args.rows = source_rows();
        args.C = shape.C;
        args.dtype = dtype;
        args.threads = threads;
        args.x = at<const void>(x);
        args.prologue.dropout = dropout(rng, true);
        args.a = at<void>(y);
        passes().source(args);
    }
};

Plan make_plan(bool bf16, int64_t N, int64_t H, int64_t W, int64_t C, int64_t K, int R, int S, int stride, int pad_left,
               int pad_right, int pad_top, int pad_bottom, const std::string& act, float slope, double eps, double p,
               const std::string& drop_at, int64_t short_C, int short_stride, const std::string& short_act,
               double short_eps, const std::string& act_out) {
    Plan plan;
    ConvShape& s = plan.shape;
    s.N = N;
    s.H = H;
    s.W = W;
    s.C = C;
    s.K = K;
    s.R = R;
    s.S = S;
    s.stride = stride;
    s.pad_left = pad_left;
    s.pad_right = pad_right;
    s.pad_top = pad_top;
    s.pad_bottom = pad_bottom;
    s.P = (H + pad_top + pad_bottom - R) / stride + 1;
    s.Q = (W + pad_left + pad_right - S) / stride + 1;
    plan.dtype = bf16 ? DType::bf16 : DType::f32;
    plan.act = parse_act(act);
    plan.short_act = parse_act(short_act);
    plan.act_out = parse_act(act_out);
    plan.slope = slope;
    plan.eps = eps;
    plan.short_eps = short_eps;
    plan.p = p;
    plan.drop_at = drop_at;
    plan.short_C = short_C;
    plan.short_stride = short_stride;
    return plan;
}

}  // namespace
}  // namespace wrn_fast

PYBIND11_MODULE(_cpu, m) {
    using namespace wrn_fast;
    using release = py::call_guard<py::gil_scoped_release>;
    m.doc() = "Kernels of the cpu backend: pointers and sizes only, see wrn_fast/backends/cpu.py";

    m.def(
        "isa", [] { return std::string(kernels().name); },
        "The instruction set in use; ValueError if WRN_FAST_ISA names one that cannot be had.");

    py::class_<Plan>(m, "Plan", "One ConvProblem; methods take the thread count and pointers (0: absent).")
        .def(py::init(&make_plan), py::kw_only(), py::arg("bf16"), py::arg("N"), py::arg("H"), py::arg("W"), py::arg("C"),
             py::arg("K"), py::arg("R"), py::arg("S"), py::arg("stride"), py::arg("pad_left"), py::arg("pad_right"),
             py::arg("pad_top"), py::arg("pad_bottom"), py::arg("act"), py::arg("slope"), py::arg("eps"), py::arg("p"),
             py::arg("drop_at"), py::arg("short_C"), py::arg("short_stride"), py::arg("short_act"), py::arg("short_eps"),
             py::arg("act_out"))
        .def("source", &Plan::source, release())
        .def("source_short", &Plan::source_short, release())
        .def("epilogue", &Plan::epilogue, release())
        .def("source_grad", &Plan::source_grad, release())
        .def("bn_bwd_apply", &Plan::bn_bwd_apply, release())
        .def("channel_stats", &Plan::channel_stats, release())
        .def("drop", &Plan::drop, release());
}
