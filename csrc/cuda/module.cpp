// wrn_fast._cuda: device pointers as integers, sizes, a stream; nothing of torch. wrn_fast/backends/cuda.py checks
// tensors, allocates, and keeps them alive. Importing it needs neither a GPU nor a driver.
#include "binding.h"

#ifndef WRN_DEVICE_TYPE
#define WRN_DEVICE_TYPE "cuda"
#endif

namespace wrn_fast {
namespace cuda {
namespace {

Rows checked_rows(int dtype, int64_t rows, int C) {
  positive(rows, "rows");
  positive(C, "C");
  return {checked_dtype(dtype), rows, C};
}

void bind_apply(int dtype, int64_t rows, int C, Pointer x, Pointer stats, Pointer gamma, Pointer beta, double eps,
                int act, double slope, Pointer rng, double p, Pointer y, Pointer stream) {
  present(x, "x");
  present(y, "y");
  apply(checked_rows(dtype, rows, C), at(x), norm(stats, gamma, beta, eps), checked_act(act), slope, mask(rng, p),
        at(y), at(stream));
}

void bind_quantize(int dtype, int64_t rows, int C, Pointer x, Pointer stats, Pointer gamma, Pointer beta, double eps,
                   int act, double slope, Pointer rng, double p, Pointer amax, Pointer y, Pointer stream) {
  aligned16(x, "x");
  aligned16(y, "y");
  present(amax, "amax");
  const Rows shape = checked_rows(dtype, rows, C);
  require(shape.dtype == DType::bf16 || shape.dtype == DType::f16, "dtype", "bfloat16 or float16", dtype);
  require(C % 16 == 0, "C", "a multiple of 16", C);
  quantize(shape, at(x), norm(stats, gamma, beta, eps), checked_act(act), slope, mask(rng, p), at<const float>(amax),
           at(y), at(stream));
}

void bind_bn_bwd_apply(int dtype, int64_t rows, int C, Pointer g, Pointer x, Pointer stats, Pointer gamma, double eps,
                       Pointer sums, Pointer dx, Pointer stream) {
  present(g, "g");
  present(x, "x");
  present(stats, "stats");
  present(dx, "dx");
  bn_bwd_apply(checked_rows(dtype, rows, C), at(g), at(x), norm(stats, gamma, 0, eps), at(sums), at(dx), at(stream));
}

void bind_channel_stats(int dtype, int64_t rows, int C, Pointer x, Pointer stats, Pointer workspace, Pointer stream) {
  present(x, "x");
  present(stats, "stats");
  present(workspace, "workspace");
  channel_stats(checked_rows(dtype, rows, C), at(x), at(stats), at(workspace), at(stream));
}

void bind_act_backward(int dtype, int64_t rows, int C, Pointer da, Pointer x, Pointer stats, Pointer gamma,
                       Pointer beta, double eps, int act, double slope, Pointer rng, double p, Pointer g, Pointer sums,
                       Pointer workspace, Pointer stream) {
  present(da, "da");
  present(x, "x");
  present(g, "g");
  require(!sums || workspace, "workspace", "a pointer where there are sums", "null");
  act_backward(checked_rows(dtype, rows, C), at(da), at(x), norm(stats, gamma, beta, eps), checked_act(act), slope,
               mask(rng, p), at(g), at(sums), at(workspace), at(stream));
}

void bind_act_mask(int dtype, int64_t rows, int C, Pointer x, Pointer stats, Pointer gamma, Pointer beta, double eps,
                   int act, Pointer bits, Pointer stream) {
  present(x, "x");
  present(bits, "bits");
  const Act kind = checked_act(act);
  require(kind == Act::relu || kind == Act::leaky_relu, "act", "relu or leaky_relu", act);
  act_mask(checked_rows(dtype, rows, C), at(x), norm(stats, gamma, beta, eps), kind, at(bits), at(stream));
}

void bind_mask_backward(int dtype, int64_t rows, int C, Pointer da, Pointer bits, Pointer scale, double slope,
                        Pointer rng, double p, Pointer g, Pointer stream) {
  present(da, "da");
  present(g, "g");
  mask_backward(checked_rows(dtype, rows, C), at(da), at(bits), at(scale), slope, mask(rng, p), at(g), at(stream));
}

void bind_merge_moments(int wide, int C, Pointer counts, Pointer moments, int64_t parts, Pointer stats,
                        Pointer workspace, Pointer stream) {
  positive(C, "C");
  positive(parts, "parts");
  present(counts, "counts");
  present(moments, "moments");
  present(stats, "stats");
  require(workspace || merge_moments_workspace(checked_wide(wide), parts, C) == 0, "workspace", "a pointer", "null");
  merge_moments(checked_wide(wide), C, at(counts), at(moments), parts, at(stats), at(workspace), at(stream));
}

void bind_add_slabs(int wide, Pointer from, int64_t slabs, int64_t count, int dtype, Pointer out, Pointer workspace,
                    Pointer stream) {
  positive(slabs, "slabs");
  positive(count, "count");
  present(from, "from_");
  present(out, "out");
  require(workspace || add_slabs_workspace(checked_wide(wide), slabs, count) == 0, "workspace", "a pointer", "null");
  add_slabs(checked_wide(wide), at(from), slabs, count, checked_dtype(dtype), at(out), at(workspace), at(stream));
}

}  // namespace
}  // namespace cuda
}  // namespace wrn_fast

PYBIND11_MODULE(_cuda, m) {
  using namespace wrn_fast::cuda;
  namespace py = pybind11;
  m.doc() = "Kernels of the cuda backend: pointers, sizes and a stream, see wrn_fast/backends/cuda.py";
  m.attr("DEVICE") = WRN_DEVICE_TYPE;
  bind_sm90(m);
  bind_weights(m);
  bind_head(m);

  m.def("apply", &bind_apply, release(), py::kw_only(), py::arg("dtype"), py::arg("rows"), py::arg("C"), py::arg("x"),
        py::arg("stats") = 0, py::arg("gamma") = 0, py::arg("beta") = 0, py::arg("eps") = 0., py::arg("act") = 0,
        py::arg("slope") = 0., py::arg("rng") = 0, py::arg("p") = 0., py::arg("y"), py::arg("stream"));
  m.def("quantize", &bind_quantize, release(), py::kw_only(), py::arg("dtype"), py::arg("rows"), py::arg("C"),
        py::arg("x"), py::arg("stats"), py::arg("gamma"), py::arg("beta"), py::arg("eps"), py::arg("act"),
        py::arg("slope"), py::arg("rng"), py::arg("p"), py::arg("amax"), py::arg("y"), py::arg("stream"));
  m.def("bn_bwd_apply", &bind_bn_bwd_apply, release(), py::kw_only(), py::arg("dtype"), py::arg("rows"), py::arg("C"),
        py::arg("g"), py::arg("x"), py::arg("stats"), py::arg("gamma"), py::arg("eps"), py::arg("sums"), py::arg("dx"),
        py::arg("stream"));
  m.def("channel_stats", &bind_channel_stats, release(), py::kw_only(), py::arg("dtype"), py::arg("rows"), py::arg("C"),
        py::arg("x"), py::arg("stats"), py::arg("workspace"), py::arg("stream"));
  m.def("act_backward", &bind_act_backward, release(), py::kw_only(), py::arg("dtype"), py::arg("rows"), py::arg("C"),
        py::arg("da"), py::arg("x"), py::arg("stats"), py::arg("gamma"), py::arg("beta"), py::arg("eps"),
        py::arg("act"), py::arg("slope"), py::arg("rng"), py::arg("p"), py::arg("g"), py::arg("sums"),
        py::arg("workspace"), py::arg("stream"));
  m.def("act_mask", &bind_act_mask, release(), py::kw_only(), py::arg("dtype"), py::arg("rows"), py::arg("C"),
        py::arg("x"), py::arg("stats"), py::arg("gamma"), py::arg("beta"), py::arg("eps"), py::arg("act"),
        py::arg("bits"), py::arg("stream"));
  m.def("mask_backward", &bind_mask_backward, release(), py::kw_only(), py::arg("dtype"), py::arg("rows"), py::arg("C"),
        py::arg("da"), py::arg("bits"), py::arg("scale"), py::arg("slope"), py::arg("rng"), py::arg("p"), py::arg("g"),
        py::arg("stream"));
  m.def("merge_moments", &bind_merge_moments, release(), py::kw_only(), py::arg("wide"), py::arg("C"),
        py::arg("counts"), py::arg("moments"), py::arg("parts"), py::arg("stats"), py::arg("workspace"),
        py::arg("stream"));
  m.def("add_slabs", &bind_add_slabs, release(), py::kw_only(), py::arg("wide"), py::arg("from_"), py::arg("slabs"),
        py::arg("count"), py::arg("dtype"), py::arg("out"), py::arg("workspace"), py::arg("stream"));

  m.def(
      "channel_stats_workspace",
      [](int dtype, int64_t rows, int C) { return channel_stats_workspace(checked_rows(dtype, rows, C)); },
      py::kw_only(), py::arg("dtype"), py::arg("rows"), py::arg("C"));
  m.def(
      "act_backward_workspace",
      [](int dtype, int64_t rows, int C) { return act_backward_workspace(checked_rows(dtype, rows, C)); },
      py::kw_only(), py::arg("dtype"), py::arg("rows"), py::arg("C"));
  m.def(
      "merge_moments_workspace",
      [](int wide, int64_t parts, int C) { return merge_moments_workspace(checked_wide(wide), parts, C); },
      py::kw_only(), py::arg("wide"), py::arg("parts"), py::arg("C"));
  m.def(
      "add_slabs_workspace",
      [](int wide, int64_t slabs, int64_t count) { return add_slabs_workspace(checked_wide(wide), slabs, count); },
      py::kw_only(), py::arg("wide"), py::arg("slabs"), py::arg("count"));
}
