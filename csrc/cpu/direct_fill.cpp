// Prologue of the direct kernel: one row of pixels into the zero-bordered buffer.
#include "act.h"
#include "direct.h"
#include "philox.h"

namespace wrn_fast {
namespace WRN_ISA {
namespace {

template <class T, bool AFFINE, Act act>
WRN_INLINE void pixel(const DirectSource& s, const T* x, const float* multipliers, float* out) {
  const Vec slope = broadcast(s.prologue.slope);
  for (int64_t c = 0; c < s.C; c += VL) {
    Vec v = load_upto(x + c, s.C - c);
    if (AFFINE)
      v = activate<act>(fma(v - load(s.affine.center + c), load(s.affine.scale + c), load(s.affine.shift + c)), slope);
    if (multipliers) v *= load(multipliers + c);
    store(out + c, v);
  }
}

template <class T, bool AFFINE, Act act>
void row(const DirectSource& s, int64_t image, int64_t h, float* out, float* multipliers) {
  if (h < 0 || h >= s.H) {
    memset(out, 0, sizeof(float) * static_cast<size_t>(s.cols * s.padded));
    return;
  }
  const int64_t first = (image * s.H + h) * s.W * s.C;
  const T* x = static_cast<const T*>(s.data) + first;
  const bool drop = s.prologue.dropout.active;
  if (drop) dropout_multipliers(multipliers, first, s.W * s.C, s.prologue.dropout);
  for (int64_t j = 0; j < s.cols; ++j, out += s.padded) {
    const int64_t w = s.first_col + j * s.step;
    if (w < 0 || w >= s.W)
      memset(out, 0, sizeof(float) * static_cast<size_t>(s.padded));
    else
      pixel<T, AFFINE, act>(s, x + w * s.C, drop ? multipliers + w * s.C : nullptr, out);
  }
}

using RowFn = void (*)(const DirectSource&, int64_t, int64_t, float*, float*);

template <class T>
RowFn row_for(const DirectSource& s) {
  switch (s.prologue.act) {
    case Act::relu:
      return row<T, true, Act::relu>;
    case Act::leaky_relu:
      return row<T, true, Act::leaky_relu>;
    case Act::silu:
      return row<T, true, Act::silu>;
    default:
      return s.affine.center ? row<T, true, Act::identity> : row<T, false, Act::identity>;
  }
}

}  // namespace

void fill_row(const DirectSource& s, int64_t image, int64_t h, float* out, float* multipliers) {
  (s.dtype == DType::f32 ? row_for<float>(s) : row_for<bf16>(s))(s, image, h, out, multipliers);
}

}  // namespace WRN_ISA
}  // namespace wrn_fast
