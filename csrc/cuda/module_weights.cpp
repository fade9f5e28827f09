// Bindings of what is made of weights: packed filters, folded BatchNorms; one by one, or all of a model again.
#include <vector>

#include "binding.h"
#include "sm90.h"

namespace wrn_fast {
namespace cuda {
namespace {

namespace py = pybind11;

// Rows of a packed filter, K or C: the kernels have multiples of 16.
int64_t padded(int64_t rows) {
  return (rows + 15) / 16 * 16;
}

DType checked_half(int dtype) {
  const DType to = checked_dtype(dtype);
  require(to == DType::bf16 || to == DType::f16, "dtype", "bfloat16 or float16", dtype);
  return to;
}

Filter filter(Pointer w, int w_dtype, int64_t stride_k, int64_t stride_c, int64_t stride_r, int64_t stride_s, int K,
              int C, int R, int S, bool transpose, DType to, Pointer packed, Pointer samples) {
  present(w, "w");
  Filter f;
  f.w = {at(w), checked_dtype(w_dtype, "w_dtype"), stride_k, stride_c, stride_r, stride_s};
  require(f.w.dtype == DType::f32 || f.w.dtype == to, "w_dtype", "float32 or dtype", w_dtype);
  positive(K, "K");
  positive(C, "C");
  positive(R, "R");
  positive(S, "S");
  aligned16(packed, "packed");
  f.K = K;
  f.C = C;
  f.R = R;
  f.S = S;
  f.transpose = transpose;
  f.out_rows = static_cast<int>(padded(transpose ? C : K));
  f.block_rows = sm90_block_k(f.out_rows);
  f.packed = at(packed);
  f.samples = at(samples);
  return f;
}

Fold fold(int C, Pointer mean, Pointer var, int stats_dtype, Pointer gamma, Pointer beta, int affine_dtype, double eps,
          Pointer table) {
  positive(C, "C");
  present(mean, "mean");
  present(var, "var");
  present(table, "table");
  require(eps >= 0, "eps", "a number of at least 0", eps);
  Fold f;
  f.mean = at(mean);
  f.var = at(var);
  f.gamma = at(gamma);
  f.beta = at(beta);
  f.stats_dtype = checked_dtype(stats_dtype, "stats_dtype");
  f.affine_dtype = checked_dtype(affine_dtype, "affine_dtype");
  f.C = C;
  f.eps = eps;
  f.table = at(table);
  return f;
}

// Everything that a captured graph reads and does not make, to be made again by a launch or two.
struct Weights {
  DType dtype;  // of the packed filters
  std::vector<Filter> filters;
  std::vector<Fold> norms;

  explicit Weights(int dtype_) : dtype(checked_half(dtype_)) {}

  void renew(bool all, Pointer stream) const {
    pack_filters(filters.data(), static_cast<int>(filters.size()), dtype, all, at(stream));
    fold_norms(norms.data(), static_cast<int>(norms.size()), DType::f32, at(stream));
  }
};

}  // namespace

void bind_weights(py::module_& m) {
  m.def(
      "packed_bytes",
      [](int64_t K, int64_t C, int R, int S, bool transpose, bool e4m3) {
        return transpose ? sm90_packed_bytes(padded(C), K, R, S) : sm90_packed_bytes(padded(K), C, R, S, e4m3);
      },
      py::kw_only(), py::arg("K"), py::arg("C"), py::arg("R"), py::arg("S"), py::arg("transpose"),
      py::arg("e4m3") = false);
  m.def(
      "samples_bytes",
      [](int w_dtype, int K, int C, int R, int S) {
        Weight w;
        w.dtype = checked_dtype(w_dtype, "w_dtype");
        return pack_samples_bytes(w, K, C, R, S);
      },
      py::kw_only(), py::arg("w_dtype"), py::arg("K"), py::arg("C"), py::arg("R"), py::arg("S"));
  m.def(
      "pack",
      [](Pointer w, int w_dtype, int64_t stride_k, int64_t stride_c, int64_t stride_r, int64_t stride_s, int K, int C,
         int R, int S, bool transpose, int dtype, Pointer packed, Pointer samples, bool all, Pointer stream) {
        const DType to = checked_half(dtype);
        const Filter f =
            filter(w, w_dtype, stride_k, stride_c, stride_r, stride_s, K, C, R, S, transpose, to, packed, samples);
        pack_filters(&f, 1, to, all, at(stream));
      },
      release(), py::kw_only(), py::arg("w"), py::arg("w_dtype"), py::arg("stride_k"), py::arg("stride_c"),
      py::arg("stride_r"), py::arg("stride_s"), py::arg("K"), py::arg("C"), py::arg("R"), py::arg("S"),
      py::arg("transpose"), py::arg("dtype"), py::arg("packed"), py::arg("samples"), py::arg("all"), py::arg("stream"));
  m.def(
      "pack_e4m3",
      [](Pointer w, int w_dtype, int64_t stride_k, int64_t stride_c, int64_t stride_r, int64_t stride_s, int K, int C,
         int R, int S, Pointer amax, Pointer packed, Pointer scale, Pointer factor, Pointer stream) {
        present(amax, "amax");
        present(scale, "scale");
        present(factor, "factor");
        const DType of_w = checked_dtype(w_dtype, "w_dtype");
        require(of_w != DType::f64, "w_dtype", "float32, bfloat16 or float16", w_dtype);
        Filter f = filter(w, w_dtype, stride_k, stride_c, stride_r, stride_s, K, C, R, S, false, of_w, packed, 0);
        f.scale = at<const float>(scale);
        filter_scales(f, at<const float>(amax), at<float>(scale), at<float>(factor), at(stream));
        pack_filter_e4m3(f, at(stream));
      },
      release(), py::kw_only(), py::arg("w"), py::arg("w_dtype"), py::arg("stride_k"), py::arg("stride_c"),
      py::arg("stride_r"), py::arg("stride_s"), py::arg("K"), py::arg("C"), py::arg("R"), py::arg("S"), py::arg("amax"),
      py::arg("packed"), py::arg("scale"), py::arg("factor"), py::arg("stream"));
  m.def(
      "affine_table",
      [](int wide, int C, Pointer stats, Pointer gamma, Pointer beta, double eps, Pointer table, Pointer stream) {
        const DType type = checked_wide(wide);
        positive(C, "C");
        present(stats, "stats");
        const Fold f = fold(C, stats, stats + C * size_of(type), wide, gamma, beta, wide, eps, table);
        fold_norms(&f, 1, type, at(stream));
      },
      release(), py::kw_only(), py::arg("wide"), py::arg("C"), py::arg("stats"), py::arg("gamma"), py::arg("beta"),
      py::arg("eps"), py::arg("table"), py::arg("stream"));

  py::class_<Weights>(m, "Weights", "What is made of a model's weights, and made again where they changed.")
      .def(py::init<int>(), py::kw_only(), py::arg("dtype"))
      .def(
          "add_filter",
          [](Weights& all, Pointer w, int w_dtype, int64_t stride_k, int64_t stride_c, int64_t stride_r,
             int64_t stride_s, int K, int C, int R, int S, bool transpose, Pointer packed, Pointer samples) {
            present(samples, "samples");
            all.filters.push_back(filter(w, w_dtype, stride_k, stride_c, stride_r, stride_s, K, C, R, S, transpose,
                                         all.dtype, packed, samples));
          },
          py::kw_only(), py::arg("w"), py::arg("w_dtype"), py::arg("stride_k"), py::arg("stride_c"),
          py::arg("stride_r"), py::arg("stride_s"), py::arg("K"), py::arg("C"), py::arg("R"), py::arg("S"),
          py::arg("transpose"), py::arg("packed"), py::arg("samples"))
      .def(
          "add_norm",
          [](Weights& all, int C, Pointer mean, Pointer var, int stats_dtype, Pointer gamma, Pointer beta,
             int affine_dtype, double eps, Pointer table, Pointer stats) {
            all.norms.push_back(fold(C, mean, var, stats_dtype, gamma, beta, affine_dtype, eps, table));
            all.norms.back().stats = at(stats);
          },
          py::kw_only(), py::arg("C"), py::arg("mean"), py::arg("var"), py::arg("stats_dtype"), py::arg("gamma"),
          py::arg("beta"), py::arg("affine_dtype"), py::arg("eps"), py::arg("table"), py::arg("stats") = 0)
      .def("renew", &Weights::renew, release(), py::kw_only(), py::arg("all"), py::arg("stream"));
}

}  // namespace cuda
}  // namespace wrn_fast
