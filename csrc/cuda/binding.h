// What the bindings share: pointers as integers, checks that name the argument.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common.h"

namespace wrn_fast {
namespace cuda {

using Pointer = uintptr_t;

template <class T = void>
T* at(Pointer p) {
  return reinterpret_cast<T*>(p);
}

template <class T>
void require(bool holds, const char* name, const char* expected, const T& got) {
  if (holds) return;
  std::ostringstream text;
  text << '`' << name << "`: expected " << expected << ", got " << got;
  throw std::invalid_argument(text.str());
}

inline DType checked_dtype(int code, const char* name = "dtype") {
  require(code >= 0 && code <= static_cast<int>(DType::f64), name, "a code of problem.h's DType", code);
  return static_cast<DType>(code);
}
inline DType checked_wide(int code) {
  const DType wide = checked_dtype(code, "wide");
  require(wide == DType::f32 || wide == DType::f64, "wide", "float32 or float64", code);
  return wide;
}
inline Act checked_act(int code, const char* name = "act") {
  require(code >= 0 && code <= static_cast<int>(Act::leaky_relu), name, "a code of problem.h's Act", code);
  return static_cast<Act>(code);
}
inline void present(Pointer p, const char* name) {
  require(p != 0, name, "a pointer", "null");
}
inline void positive(int64_t value, const char* name) {
  require(value > 0, name, "a positive number", value);
}

inline void aligned16(Pointer p, const char* name, bool optional = false) {
  if (!optional) present(p, name);
  require(p % 16 == 0, name, "a multiple of 16", p);
}

inline Norm norm(Pointer stats, Pointer gamma, Pointer beta, double eps) {
  require(eps >= 0, "eps", "a number of at least 0", eps);
  require(stats || !(gamma || beta), "stats", "a pointer where there are gamma or beta", "null");
  return {at(stats), at(gamma), at(beta), eps};
}

inline Mask mask(Pointer rng, double p) {
  require(p >= 0 && p <= 1, "p", "a probability in [0, 1]", p);
  require(rng != 0 || p == 0, "rng", "a pointer where p is above 0", "null");
  if (p == 0) return {};
  if (p == 1) return {at<const int64_t>(rng), 0xffffffffu, 0.};
  return {at<const int64_t>(rng), static_cast<uint32_t>(p * 4294967296.), 1. / (1. - p)};
}

using release = pybind11::call_guard<pybind11::gil_scoped_release>;

// module_sm90.cpp, module_weights.cpp, module_head.cpp
void bind_sm90(pybind11::module_& m);
void bind_weights(pybind11::module_& m);
void bind_head(pybind11::module_& m);

}  // namespace cuda
}  // namespace wrn_fast
