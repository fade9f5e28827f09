// The two transforms of F(3x3,4x4) that fprop does not have: dy tile 4x4 -> 6x6, products 6x6 -> taps 3x3.
#include "wgrad.h"

namespace wrn_fast {
namespace WRN_ISA {
namespace {

constexpr float kA = 5.f / 8, kB = 3.f / 2, kAA = kA * kA, kBB = kB * kB;
// 1 / prod (p_i - p_j) for the points 0, +-a, +-b.
constexpr float kN0 = static_cast<float>(1. / (225. / 256));
constexpr float kNA = static_cast<float>(1. / (2. * (25. / 64) * (25. / 64 - 9. / 4)));
constexpr float kNB = static_cast<float>(1. / (2. * (9. / 4) * (9. / 4 - 25. / 64)));

// g[i * sg], i < 4 -> o[i * so], i < 6.
WRN_INLINE void gradient_1d(const Vec* g, int sg, Vec* o, int so) {
  const Vec a = broadcast(kA), b = broadcast(kB), aa = broadcast(kAA), bb = broadcast(kBB);
  const Vec g0 = g[0], g1 = g[sg], g2 = g[2 * sg], g3 = g[3 * sg];
  const Vec even_a = fma(aa, g2, g0), odd_a = fma(aa, g3, g1);
  const Vec even_b = fma(bb, g2, g0), odd_b = fma(bb, g3, g1);
  o[0] = g0;
  o[so] = fma(a, odd_a, even_a);
  o[2 * so] = fnma(a, odd_a, even_a);
  o[3 * so] = fma(b, odd_b, even_b);
  o[4 * so] = fnma(b, odd_b, even_b);
  o[5 * so] = g3;
}

// p[i * sp], i < 6 -> o[i * so], i < 3.
WRN_INLINE void taps_1d(const Vec* p, int sp, Vec* o, int so) {
  const Vec n0 = broadcast(kN0);
  const Vec na = broadcast(kNA), na_a = broadcast(kNA * kA), na_aa = broadcast(kNA * kAA);
  const Vec nb = broadcast(kNB), nb_b = broadcast(kNB * kB), nb_bb = broadcast(kNB * kBB);
  const Vec even_a = p[sp] + p[2 * sp], odd_a = p[sp] - p[2 * sp];
  const Vec even_b = p[3 * sp] + p[4 * sp], odd_b = p[3 * sp] - p[4 * sp];
  o[0] = fma(n0, p[0], fma(na, even_a, nb * even_b));
  o[so] = fma(na_a, odd_a, nb_b * odd_b);
  o[2 * so] = fma(na_aa, even_a, fma(nb_bb, even_b, p[5 * sp]));
}

template <class T>
void strip(const GradientInput& in, int64_t image, int64_t row, float* d, int64_t panel, int64_t plane) {
  const int64_t height = in.P - 4 * row < 4 ? in.P - 4 * row : 4;
  const T* top = static_cast<const T*>(in.data) + (image * in.P + 4 * row) * in.Q * in.K;
  for (int64_t k = 0; k < in.K; k += VL, d += panel)
    for (int64_t j = 0; j < in.tile_cols; ++j) {
      const int64_t width = in.Q - 4 * j < 4 ? in.Q - 4 * j : 4;
      const T* corner = top + 4 * j * in.K + k;
      Vec t[4 * 6];
#pragma GCC unroll 4
      for (int w = 0; w < 4; ++w) {
        Vec g[4];
#pragma GCC unroll 4
        for (int h = 0; h < 4; ++h)
          g[h] = h < height && w < width ? load_upto(corner + (h * in.Q + w) * in.K, in.K - k) : zero();
        gradient_1d(g, 1, t + w, 4);
      }
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) {
        Vec o[6];
        gradient_1d(t + i * 4, 1, o, 1);
#pragma GCC unroll 6
        for (int m = 0; m < 6; ++m) store(d + (i * 6 + m) * plane + j * VL, o[m]);
      }
    }
}

}  // namespace

void gradient_transform(const GradientInput& in, int64_t image, int64_t row, float* d, int64_t panel, int64_t plane) {
  in.dtype == DType::f32 ? strip<float>(in, image, row, d, panel, plane) : strip<bf16>(in, image, row, d, panel, plane);
}

void wgrad_output(int nv, const WgradOutput& o) {
  const bool aligned = o.C % VL == 0 && reinterpret_cast<uintptr_t>(o.dw) % (VL * sizeof(float)) == 0;
  for (int row = 0; row < o.k_count; ++row)
    for (int c = 0; c < o.c_count; c += VL) {
      const float* p = o.products + row * nv * VL + c;
      const int64_t left = o.c_count - c;
      Vec t[3 * 6];
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) {
        Vec column[6];
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) column[i] = load(p + (i * 6 + j) * o.products_plane);
        taps_1d(column, 1, t + j, 6);
      }
#pragma GCC unroll 3
      for (int r = 0; r < 3; ++r) {
        Vec taps[3];
        taps_1d(t + r * 6, 1, taps, 1);
        float* out = o.dw + ((o.k0 + row) * 9 + r * 3) * o.C + o.c0 + c;
#pragma GCC unroll 3
        for (int s = 0; s < 3; ++s, out += o.C) {
          if (o.stream && aligned)
            stream(out, taps[s]);
          else
            store_upto(out, o.add ? load_upto(out, left) + taps[s] : taps[s], left);
        }
      }
    }
}

}  // namespace WRN_ISA
}  // namespace wrn_fast
