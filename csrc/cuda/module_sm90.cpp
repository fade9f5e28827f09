// Bindings of the Hopper convolutions (sm90.h) and of the packed filters that they read.
#include "binding.h"
#include "sm90.h"

namespace wrn_fast {
namespace cuda {
namespace {

namespace py = pybind11;

ConvShape shape(int64_t N, int64_t H, int64_t W, int64_t C, int64_t K, int R, int S, int stride, int pad_left,
                int pad_right, int pad_top, int pad_bottom) {
  for (const auto& [name, value] : {std::pair<const char*, int64_t>{"N", N},
                                    {"H", H},
                                    {"W", W},
                                    {"C", C},
                                    {"K", K},
                                    {"R", R},
                                    {"S", S},
                                    {"stride", stride}})
    positive(value, name);
  return conv_shape(N, H, W, C, K, R, S, stride, pad_left, pad_right, pad_top, pad_bottom);
}

Sm90Tile checked_tile(int code) {
  require(code == 0 || code == 1, "tile", "0 (fetch9) or 1 (shift3)", code);
  return static_cast<Sm90Tile>(code);
}

void served(const char* op, const ConvShape& s, DType dtype, Sm90Tile tile) {
  const char* reason = sm90_refuses(op, s, dtype, tile);
  if (reason) throw std::invalid_argument(std::string(op) + ": " + reason);
}

void check(cudaError_t status) {
  if (status != cudaSuccess) throw Error(cudaGetErrorString(status));
}

Sm90Prologue prologue(Pointer scale, Pointer shift, int act, double slope) {
  require((scale == 0) == (shift == 0), "shift", "scale and shift together", "one alone");
  Sm90Prologue p;
  p.scale = at<const float>(scale);
  p.shift = at<const float>(shift);
  p.act = checked_act(act);
  p.slope = static_cast<float>(slope);
  return p;
}

template <class Args>
void split(Args& a, int splits, Pointer partials, Pointer counters, bool early) {
  positive(splits, "splits");
  if (splits > 1) {
    require(a.tile == Sm90Tile::fetch9, "splits", "1 where the tile is not 0", splits);
    aligned16(partials, "partials");
    present(counters, "counters");
  }
  a.splits = splits;
  a.partials = at<float>(partials);
  a.counters = at<int>(counters);
  a.early = early;
}

void fprop(const ConvShape& s, int dtype, int tile, Pointer x, Pointer scale, Pointer shift, int act, double slope,
           Pointer w, Pointer x_short, int64_t short_H, int64_t short_W, int64_t short_C, int short_stride,
           Pointer short_scale, Pointer short_shift, int short_act, Pointer w_short, Pointer bias, Pointer residual,
           Pointer y, Pointer y_act, int act_out, Pointer out_scale, Pointer out_shift, Pointer counts, Pointer moments,
           int splits, Pointer partials, Pointer counters, bool early, Pointer stream, Pointer factor,
           Pointer factor_short, Pointer rng, double p, bool drop_act) {
  Sm90Fprop a;
  a.shape = s;
  a.dtype = checked_dtype(dtype);
  a.tile = checked_tile(tile);
  served(factor ? "fprop_fp8" : "fprop", s, a.dtype, a.tile);
  require(!factor || !(scale || short_scale), "scale", "null where there is a factor", "a pointer");
  require(!factor || !x_short || factor_short, "factor_short", "a pointer where x_short is in 8 bits", "null");
  a.factor = at<const float>(factor);
  a.factor_short = at<const float>(factor_short);
  aligned16(x, "x");
  aligned16(w, "w");
  require(y || y_act, "y", "a pointer where there is no y_act", "null");
  require((counts == 0) == (moments == 0), "moments", "counts and moments together", "one alone");
  require(!moments || y, "y", "a pointer where there are moments", "null");
  a.x = at(x);
  a.prologue = prologue(scale, shift, act, slope);
  require(scale || a.prologue.act == Act::identity, "act", "0 where there is no scale", act);
  a.w = at(w);
  if (x_short) {
    aligned16(x_short, "x_short");
    aligned16(w_short, "w_short");
    positive(short_H, "short_H");
    positive(short_W, "short_W");
    positive(short_C, "short_C");
    positive(short_stride, "short_stride");
    a.x_short = at(x_short);
    a.short_H = short_H;
    a.short_W = short_W;
    a.short_C = short_C;
    a.short_stride = short_stride;
    a.short_prologue = prologue(short_scale, short_shift, short_act, slope);
    require(short_scale || a.short_prologue.act == Act::identity, "short_act", "0 where there is no scale", short_act);
    a.w_short = at(w_short);
  }
  aligned16(residual, "residual", true);
  aligned16(y, "y", true);
  aligned16(y_act, "y_act", true);
  a.mask = mask(rng, p);
  a.drop_act = drop_act;
  require(y_act || !(drop_act && p > 0), "y_act", "a pointer where it is dropped", "null");
  a.bias = at<const float>(bias);
  a.residual = at(residual);
  a.y = at(y);
  a.y_act = at(y_act);
  a.act_out = checked_act(act_out, "act_out");
  a.slope_out = static_cast<float>(slope);
  a.out_scale = at<const float>(out_scale);
  a.out_shift = at<const float>(out_shift);
  a.counts = at<float>(counts);
  a.moments = at<float>(moments);
  split(a, splits, partials, counters, early);
  check(sm90_fprop(a, at<CUstream_st>(stream)));
}

void dgrad(const ConvShape& s, int dtype, int tile, Pointer dy, Pointer w, Pointer x, Pointer scale, Pointer shift,
           int act, double slope, Pointer mean, Pointer rstd, Pointer g, Pointer sums, int splits, Pointer partials,
           Pointer counters, bool early, Pointer stream) {
  Sm90Dgrad a;
  a.shape = s;
  a.dtype = checked_dtype(dtype);
  a.tile = checked_tile(tile);
  served("dgrad", s, a.dtype, a.tile);
  aligned16(dy, "dy");
  aligned16(w, "w");
  aligned16(g, "g");
  aligned16(x, "x", true);
  require(x || !(scale || sums || act), "x", "a pointer where there are scale, act or sums", "null");
  require(!sums || (mean && rstd), "mean", "mean and rstd where there are sums", "null");
  a.dy = at(dy);
  a.w = at(w);
  a.x = at(x);
  a.prologue = prologue(scale, shift, act, slope);
  a.mean = at<const float>(mean);
  a.rstd = at<const float>(rstd);
  a.g = at(g);
  a.sums = at<float>(sums);
  split(a, splits, partials, counters, early);
  check(sm90_dgrad(a, at<CUstream_st>(stream)));
}

void wgrad(const ConvShape& s, int dtype, Pointer dy, Pointer x, Pointer workspace, Pointer dw, Pointer stream) {
  Sm90Wgrad a;
  a.shape = s;
  a.dtype = checked_dtype(dtype);
  served("wgrad", s, a.dtype, Sm90Tile::fetch9);
  aligned16(dy, "dy");
  aligned16(x, "x");
  aligned16(dw, "dw");
  a.dy = at(dy);
  a.x = at(x);
  a.workspace = at<float>(workspace);
  a.dw = at<float>(dw);
  check(sm90_wgrad(a, at<CUstream_st>(stream)));
}

}  // namespace

void bind_sm90(py::module_& m) {
  py::class_<ConvShape>(m, "Shape", "The sizes of one convolution.")
      .def(py::init(&shape), py::kw_only(), py::arg("N"), py::arg("H"), py::arg("W"), py::arg("C"), py::arg("K"),
           py::arg("R"), py::arg("S"), py::arg("stride"), py::arg("pad_left"), py::arg("pad_right"), py::arg("pad_top"),
           py::arg("pad_bottom"));

  m.def(
      "refuses",
      [](const std::string& op, const ConvShape& s, int dtype, int tile) -> py::object {
        const char* reason = sm90_refuses(op.c_str(), s, checked_dtype(dtype), checked_tile(tile));
        return reason ? py::object(py::str(reason)) : py::none();
      },
      "A sentence, or None where the kernels serve the call.");
  m.def("parts", [](const ConvShape& s, bool dgrad, int tile) { return sm90_parts(s, dgrad, checked_tile(tile)); });
  m.def("splits", &sm90_splits, py::arg("shape"), py::arg("short_C"), py::arg("dgrad"), py::arg("multiprocessors"),
        py::arg("e4m3") = false);
  m.def("partial_bytes", &sm90_partial_bytes);
  m.def("counters", &sm90_counters);
  m.def("wgrad_workspace", &sm90_wgrad_workspace);

  m.def("fprop", &fprop, release(), py::arg("shape"), py::kw_only(), py::arg("dtype"), py::arg("tile"), py::arg("x"),
        py::arg("scale"), py::arg("shift"), py::arg("act"), py::arg("slope"), py::arg("w"), py::arg("x_short"),
        py::arg("short_H"), py::arg("short_W"), py::arg("short_C"), py::arg("short_stride"), py::arg("short_scale"),
        py::arg("short_shift"), py::arg("short_act"), py::arg("w_short"), py::arg("bias"), py::arg("residual"),
        py::arg("y"), py::arg("y_act"), py::arg("act_out"), py::arg("out_scale"), py::arg("out_shift"),
        py::arg("counts"), py::arg("moments"), py::arg("splits"), py::arg("partials"), py::arg("counters"),
        py::arg("early"), py::arg("stream"), py::arg("factor") = 0, py::arg("factor_short") = 0, py::arg("rng") = 0,
        py::arg("p") = 0., py::arg("drop_act") = false);
  m.def("dgrad", &dgrad, release(), py::arg("shape"), py::kw_only(), py::arg("dtype"), py::arg("tile"), py::arg("dy"),
        py::arg("w"), py::arg("x"), py::arg("scale"), py::arg("shift"), py::arg("act"), py::arg("slope"),
        py::arg("mean"), py::arg("rstd"), py::arg("g"), py::arg("sums"), py::arg("splits"), py::arg("partials"),
        py::arg("counters"), py::arg("early"), py::arg("stream"));
  m.def("wgrad", &wgrad, release(), py::arg("shape"), py::kw_only(), py::arg("dtype"), py::arg("dy"), py::arg("x"),
        py::arg("workspace"), py::arg("dw"), py::arg("stream"));
}

}  // namespace cuda
}  // namespace wrn_fast
