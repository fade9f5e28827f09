// wrn_fast._cpu: pointers as integers and sizes in, nothing of torch. wrn_fast/backends/cpu.py checks tensors and keeps
// them alive; the interpreter lock is released inside every kernel call.
#include <pybind11/pybind11.h>

#include <cstring>

#include "isa.h"
#include "plan.h"
#include "scratch.h"

namespace py = pybind11;

namespace wrn_fast {
namespace {

// fast: the documented policy (policy.cpp). f2: F(2x2) where the policy takes a larger tile. direct: no Winograd.
Algo narrow(Algo algo, const std::string& precision) {
  if (precision == "direct") return Algo::direct;
  if (precision == "f2" && (algo == Algo::f4 || algo == Algo::f3)) return Algo::f2;
  return algo;
}

// WRN_FAST_PIN_ALGO, which wrn_fast/precision.py has checked.
Pin parse_pin(const std::string& pin) {
  if (pin == "f4") return Pin::f4;
  if (pin == "f3") return Pin::f3;
  if (pin == "f2") return Pin::f2;
  if (pin == "direct") return Pin::direct;
  return pin.empty() ? Pin::none : Pin::batch;
}

Plan make_plan(bool bf16, int64_t N, int64_t H, int64_t W, int64_t C, int64_t K, int R, int S, int stride, int pad_left,
               int pad_right, int pad_top, int pad_bottom, const std::string& act, float slope, double eps, double p,
               const std::string& drop_at, int64_t short_C, int short_stride, const std::string& short_act,
               double short_eps, const std::string& act_out, const std::string& precision, const std::string& pin_fprop,
               const std::string& pin_dgrad, const std::string& pin_wgrad) {
  Plan plan;
  const ConvShape& s = plan.shape = conv_shape(N, H, W, C, K, R, S, stride, pad_left, pad_right, pad_top, pad_bottom);
  plan.dtype = bf16 ? DType::bf16 : DType::f32;
  plan.act = parse_act(act);
  plan.short_act = parse_act(short_act);
  plan.act_out = parse_act(act_out);
  plan.slope = slope;
  plan.eps = eps;
  plan.short_eps = short_eps;
  plan.p = p;
  plan.drop_at = parse_drop_at(drop_at);
  plan.short_C = short_C;
  plan.short_stride = short_stride;
  plan.fprop_algo = narrow(choose_algo(s, false, parse_pin(pin_fprop)), precision);
  plan.dgrad_algo = narrow(choose_algo(s, true, parse_pin(pin_dgrad)), precision);
  plan.wgrad_algo = precision == "direct" || pin_wgrad == "direct" ? Algo::direct : choose_wgrad_algo(s);
  return plan;
}

FpropPointers pointers(Pointer x, Pointer w, int w_code, Pointer packed, Pointer mean, Pointer var, Pointer gamma,
                       Pointer beta, Pointer bias, Pointer residual, Pointer x_short, int64_t short_H, int64_t short_W,
                       Pointer w_short, int w_short_code, Pointer packed_short, Pointer mean_short, Pointer var_short,
                       Pointer gamma_short, Pointer beta_short, Pointer rng, Pointer out_scale, Pointer out_shift,
                       Pointer y, Pointer stats_y, Pointer y_act) {
  return {x,          w,         w_code,      packed,     mean,    var,       gamma,        beta,
          bias,       residual,  x_short,     short_H,    short_W, w_short,   w_short_code, packed_short,
          mean_short, var_short, gamma_short, beta_short, rng,     out_scale, out_shift,    y,
          stats_y,    y_act};
}

const char* name_of(Algo algo) {
  switch (algo) {
    case Algo::f4:
      return "f4";
    case Algo::f3:
      return "f3";
    case Algo::f2:
      return "f2";
    case Algo::f2s2:
      return "f2s2";
    default:
      return "direct";
  }
}

// FNV-1a over `samples` elements, `step` apart modulo `count`.
uint64_t fingerprint(Pointer data, int64_t count, int element_bytes, int64_t step, int samples) {
  const char* base = reinterpret_cast<const char*>(data);
  uint64_t hash = 0xcbf29ce484222325u;
  int64_t at = 0;
  for (int i = 0; i < samples; ++i) {
    uint32_t bits = 0;
    memcpy(&bits, base + at * element_bytes, static_cast<size_t>(element_bytes));
    hash = (hash ^ bits) * 0x100000001b3u;
    at = (at + step) % count;
  }
  return hash;
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
  m.attr("MAX_TAPS") = kTapsMax;
  m.attr("HUGE_PAGE") = kHugePage;
  m.def("scratch_bytes", &scratch_bytes, "Bytes of scratch and activations that the calling thread holds.");
  m.def("scratch_release", &scratch_release, "Gives the calling thread's scratch and activations back.");
  m.def(
      "activations", [](int64_t bytes) { return reinterpret_cast<Pointer>(activation_block(bytes)); },
      "A block that the calling thread keeps; valid until the next call.");
  m.def(
      "advise_huge_pages", [](Pointer data, int64_t bytes) { advise_huge_pages(reinterpret_cast<void*>(data), bytes); },
      "Asks for huge pages in memory that has not been written yet.");
  m.def("fingerprint", &fingerprint, "A hash of `samples` elements that lie `step` apart.");

  py::class_<FpropPointers>(m, "FpropPointers", "The tensors of one fprop, in the order of csrc/cpu/plan.h; 0: absent.")
      .def(py::init(&pointers));

  py::class_<Chain>(m, "Chain", "fprops in a row, run without Python between them.")
      .def(py::init<>())
      .def("add", &Chain::add)
      .def("run", &Chain::run, release());

  py::class_<Plan>(m, "Plan", "One ConvProblem; methods take the thread count and pointers (0: absent).")
      .def(py::init(&make_plan), py::kw_only(), py::arg("bf16"), py::arg("N"), py::arg("H"), py::arg("W"), py::arg("C"),
           py::arg("K"), py::arg("R"), py::arg("S"), py::arg("stride"), py::arg("pad_left"), py::arg("pad_right"),
           py::arg("pad_top"), py::arg("pad_bottom"), py::arg("act"), py::arg("slope"), py::arg("eps"), py::arg("p"),
           py::arg("drop_at"), py::arg("short_C"), py::arg("short_stride"), py::arg("short_act"), py::arg("short_eps"),
           py::arg("act_out"), py::arg("precision"), py::arg("pin_fprop"), py::arg("pin_dgrad"), py::arg("pin_wgrad"))
      .def_property_readonly("fprop_algo", [](const Plan& p) { return name_of(p.fprop_algo); })
      .def_property_readonly("dgrad_algo", [](const Plan& p) { return name_of(p.dgrad_algo); })
      .def_property_readonly("wgrad_algo", [](const Plan& p) { return name_of(p.wgrad_algo); })
      .def("fprop", &Plan::fprop, release())
      .def("dgrad", &Plan::dgrad, release())
      .def("wgrad", &Plan::wgrad, release())
      .def("bn_bwd_apply", &Plan::bn_bwd_apply, release())
      .def("act_mask", &Plan::act_mask, release())
      .def("input_grad", &Plan::input_grad, release())
      .def("channel_stats", &Plan::channel_stats, release())
      .def("drop", &Plan::drop, release())
      .def("packed_size", &Plan::packed_size)
      .def("packed_size_short", &Plan::packed_size_short)
      .def("pack", &Plan::pack, release())
      .def("pack_short", &Plan::pack_short, release());
}
