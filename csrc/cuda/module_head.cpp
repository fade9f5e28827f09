// Bindings of the head.
#include "binding.h"

namespace wrn_fast {
namespace cuda {
namespace {

namespace py = pybind11;

void sizes(int64_t N, int pixels, int C) {
  positive(N, "N");
  positive(pixels, "pixels");
  positive(C, "C");
}

void bind_forward(int dtype, int64_t N, int pixels, int C, int K, Pointer y, Pointer stats, Pointer gamma, Pointer beta,
                  double eps, int act, double slope, Pointer w, int w_dtype, Pointer bias, bool cosine, Pointer out,
                  Pointer feat, Pointer stream) {
  sizes(N, pixels, C);
  positive(K, "K");
  require(C <= kMostFeatures, "C", "at most 2048", C);
  present(y, "y");
  present(w, "w");
  present(out, "out");
  present(feat, "feat");
  Head h;
  h.dtype = checked_dtype(dtype);
  h.w_dtype = checked_dtype(w_dtype, "w_dtype");
  require(h.w_dtype == h.dtype || (h.w_dtype == DType::f32 && h.dtype != DType::f64), "w_dtype", "dtype, or float32",
          w_dtype);
  h.N = N;
  h.pixels = pixels;
  h.C = C;
  h.K = K;
  h.y = at(y);
  h.norm = norm(stats, gamma, beta, eps);
  h.act = checked_act(act);
  h.slope = slope;
  h.w = at(w);
  h.bias = at(bias);
  h.cosine = cosine;
  h.out = at(out);
  h.feat = at(feat);
  head(h, at(stream));
}

void bind_backward(int dtype, int64_t N, int pixels, int C, Pointer dfeat, Pointer y, Pointer stats, Pointer gamma,
                   Pointer beta, double eps, int act, double slope, bool batch, Pointer dy, Pointer sums,
                   Pointer workspace, Pointer stream) {
  sizes(N, pixels, C);
  require(N * pixels < int64_t{1} << 32, "N", "fewer than 2^32 pixels", N);
  present(dfeat, "dfeat");
  present(y, "y");
  present(dy, "dy");
  require(!batch || sums, "sums", "a pointer where `batch`", "null");
  require(!sums || stats, "stats", "a pointer where there are sums", "null");
  require(!sums || workspace, "workspace", "a pointer where there are sums", "null");
  HeadBackward h;
  h.dtype = checked_dtype(dtype);
  h.N = N;
  h.pixels = pixels;
  h.C = C;
  h.dfeat = at(dfeat);
  h.y = at(y);
  h.norm = norm(stats, gamma, beta, eps);
  h.act = checked_act(act);
  h.slope = slope;
  h.batch = batch;
  h.dy = at(dy);
  h.sums = at(sums);
  h.workspace = at(workspace);
  head_bwd(h, at(stream));
}

}  // namespace

void bind_head(py::module_& m) {
  m.attr("MOST_FEATURES") = kMostFeatures;
  m.def("head", &bind_forward, release(), py::kw_only(), py::arg("dtype"), py::arg("N"), py::arg("pixels"),
        py::arg("C"), py::arg("K"), py::arg("y"), py::arg("stats"), py::arg("gamma"), py::arg("beta"), py::arg("eps"),
        py::arg("act"), py::arg("slope"), py::arg("w"), py::arg("w_dtype"), py::arg("bias"), py::arg("cosine"),
        py::arg("out"), py::arg("feat"), py::arg("stream"));
  m.def("head_bwd", &bind_backward, release(), py::kw_only(), py::arg("dtype"), py::arg("N"), py::arg("pixels"),
        py::arg("C"), py::arg("dfeat"), py::arg("y"), py::arg("stats"), py::arg("gamma"), py::arg("beta"),
        py::arg("eps"), py::arg("act"), py::arg("slope"), py::arg("batch"), py::arg("dy"), py::arg("sums"),
        py::arg("workspace"), py::arg("stream"));
  m.def(
      "head_bwd_workspace",
      [](int dtype, int64_t N, int pixels, int C) {
        sizes(N, pixels, C);
        return head_bwd_workspace(checked_dtype(dtype), N, pixels, C);
      },
      py::kw_only(), py::arg("dtype"), py::arg("N"), py::arg("pixels"), py::arg("C"));
}

}  // namespace cuda
}  // namespace wrn_fast
