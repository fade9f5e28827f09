// Which algorithm a call runs when none is pinned. Compiled once, for the baseline.
#include "isa.h"

namespace wrn_fast {

Algo choose_algo(const ConvShape& s, bool dgrad, bool pin_batch) {
  if (s.R != 3 || s.S != 3 || s.stride != 1) return Algo::direct;
  // The gradient is a convolution of dy padded by 2 - pad: a negative number would crop.
  if (dgrad && (s.pad_left > 2 || s.pad_right > 2 || s.pad_top > 2 || s.pad_bottom > 2)) return Algo::direct;
  const int64_t height = dgrad ? s.H : s.P, width = dgrad ? s.W : s.Q;
  // A 4x4 tile on such an output is mostly overhang.
  if (height <= 2 || width <= 2) return Algo::f2;
  // The batch enters here and nowhere else. With few tiles the transformed filter is read once for almost nothing:
  // 36 against 16 matrices decide, not the arithmetic (640@8, one image: 1.25-1.55 ms F(2x2), 2.2 ms F(4x4), 2 cores).
  const int64_t tiles = s.N * ((height + 3) / 4) * ((width + 3) / 4);
  const int64_t filter_bytes = 36 * s.C * s.K * 4;
  if (!pin_batch && tiles <= 6 && filter_bytes > (int64_t{32} << 20)) return Algo::f2;
  return Algo::f4;
}

Algo choose_wgrad_algo(const ConvShape& s) {
  return s.R == 3 && s.S == 3 && s.stride == 1 ? Algo::f4 : Algo::direct;
}

}  // namespace wrn_fast
