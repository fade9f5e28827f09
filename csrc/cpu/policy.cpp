// Which algorithm a call runs when none is pinned. Compiled once, for the baseline.
#include "isa.h"

namespace wrn_fast {

namespace {

bool winograd_serves(const ConvShape& s, bool dgrad) {
  if (s.R != 3 || s.S != 3 || s.stride != 1) return false;
  // The gradient is a convolution of dy padded by 2 - pad: a negative number would crop.
  return !dgrad || (s.pad_left <= 2 && s.pad_right <= 2 && s.pad_top <= 2 && s.pad_bottom <= 2);
}

bool polyphase_serves(const ConvShape& s, bool dgrad) {
  return !dgrad && s.R == 3 && s.S == 3 && s.stride == 2;
}

// 25 products for 9 outputs against 16 for 4: fewer unless too many of a tile's outputs lie outside, as at 4x4.
bool f3_saves(int64_t height, int64_t width) {
  return 25 * ((height + 2) / 3) * ((width + 2) / 3) < 16 * ((height + 1) / 2) * ((width + 1) / 2);
}

}  // namespace

Algo choose_algo(const ConvShape& s, bool dgrad, Pin pin) {
  // 25 products for 36: 1.74 ms an image against 2.24 at 160 to 320 and at 320 to 640 channels, one core, and 95 us
  // against 110 at 32 to 64, where the transforms weigh more. Its error is F(2x2)'s.
  const bool pinned = pin != Pin::none && pin != Pin::batch;
  if (polyphase_serves(s, dgrad) && (pinned ? pin == Pin::f2 : s.C >= 32 && s.K >= 32)) return Algo::f2s2;
  if (!winograd_serves(s, dgrad) || pin == Pin::direct) return Algo::direct;
  if (pin == Pin::f4) return Algo::f4;
  if (pin == Pin::f3) return Algo::f3;
  if (pin == Pin::f2) return Algo::f2;
  // Eager's error grows with the channels of the sum, F(4x4)'s hardly does: 4.0e-7 at 16 against eager's 1.5e-7, 4.2e-7
  // at 32 against 2.1e-7, 4.2e-7 at 64 against 3.0e-7, 6.6e-7 at 640 against 8.8e-7. Whole networks of 16 and 32
  // channels would pass 1.25 times eager's error; F(3x3), 2.4e-7 at 32, and F(2x2), 1.4e-7 at 16, stay below it, and
  // below 16 only direct does.
  const int64_t reduction = dgrad ? s.K : s.C;
  if (s.C < 16 || s.K < 16) return Algo::direct;
  const int64_t height = dgrad ? s.H : s.P, width = dgrad ? s.W : s.Q;
  if (reduction < 64) return reduction >= 32 && f3_saves(height, width) ? Algo::f3 : Algo::f2;
  // A 4x4 tile on such an output is mostly overhang.
  if (height <= 2 || width <= 2) return Algo::f2;
  // The batch enters here and nowhere else. With few tiles the transformed filter is read once for almost nothing:
  // 36 against 16 matrices decide, not the arithmetic (640@8, one image: 1.25-1.55 ms F(2x2), 2.2 ms F(4x4), 2 cores).
  const int64_t tiles = s.N * ((height + 3) / 4) * ((width + 3) / 4);
  const int64_t filter_bytes = 36 * s.C * s.K * 4;
  if (pin == Pin::none && tiles <= 6 && filter_bytes > (int64_t{32} << 20)) return Algo::f2;
  return Algo::f4;
}

Algo choose_wgrad_algo(const ConvShape& s) {
  return s.R == 3 && s.S == 3 && s.stride == 1 ? Algo::f4 : Algo::direct;
}

}  // namespace wrn_fast
