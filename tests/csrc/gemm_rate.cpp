// How near the GEMM comes to a loop of register-only FMAs timed just before it, one thread. No test: it needs a quiet
// machine. In the repository's root, one line (AVX2: -march=x86-64-v3 -DWRN_ISA=avx2):
//
//   g++ -std=c++17 -O3 -ffp-contract=off -march=x86-64-v4 -mprefer-vector-width=512 -DWRN_ISA=avx512
//       tests/csrc/gemm_rate.cpp csrc/cpu/gemm.cpp -o gemm_rate && ./gemm_rate
//
// The 36 products of F(4x4) at K = C channels for T tiles, as a Winograd layer runs them; and one product in cache.
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

#include "../../csrc/cpu/gemm.h"

using namespace wrn_fast;
using namespace wrn_fast::WRN_ISA;

namespace {

double seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// GFLOP/s of independent FMAs.
double fma_rate() {
  Vec acc[12];
  for (Vec& a : acc) a = zero();
  const Vec a = broadcast(1e-9f), b = broadcast(1e-9f);
  const long repeats = 1000000;
  const double begin = seconds();
  for (long r = 0; r < repeats; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) acc[i] = fma(a, b, acc[i]);
    // The compiler may not see through the loop.
    asm volatile("" ::"x"(acc[0].v), "x"(acc[1].v), "x"(acc[2].v), "x"(acc[3].v), "x"(acc[4].v), "x"(acc[5].v));
  }
  const double time = seconds() - begin;
  Vec total = zero();
  for (const Vec& v : acc) total += v;
  volatile float keep = sum(total);
  (void)keep;
  return 2. * VL * 12 * static_cast<double>(repeats) / time * 1e-9;
}

float* buffer(int64_t floats) {
  float* p = static_cast<float*>(aligned_alloc(4096, static_cast<size_t>((floats * 4 + 4095) / 4096 * 4096)));
  for (int64_t i = 0; i < floats; ++i) p[i] = static_cast<float>(i * 7919 % 1000) * 1e-3f - .5f;
  return p;
}

void measure(int64_t C, int64_t K, int64_t tiles, int matrices) {
  const int64_t plane = tiles * C + 16;
  float *v = buffer(matrices * plane), *u = buffer((matrices + 1) * C * K), *m = buffer(tiles * matrices * NR);
  const int repeats = matrices == 1 ? 2000 : 1;
  double share[9];
  for (double& one : share) {
    const double peak = fma_rate(), begin = seconds();
    for (int i = 0; i < repeats; ++i)
      for (int64_t p = 0; p < K / NR; ++p)
        for (int x = 0; x < matrices; ++x) {
          const Segment segment = {v + x * plane, 0, C, u + (p * matrices + x) * C * NR, C};
          gemm_panel(NV_FULL, &segment, 1, tiles, tiles, m + x * NR, matrices * NR, segment.b + C * NR);
        }
    one = 2. * repeats * matrices * static_cast<double>(tiles * C * K) / (seconds() - begin) * 1e-9 / peak;
  }
  std::sort(share, share + 9);
  printf("C=%ld T=%ld, %d products: %.3f of the FMA loop (median of 9, best %.3f)\n", static_cast<long>(C),
         static_cast<long>(tiles), matrices, share[4], share[8]);
  free(v);
  free(u);
  free(m);
}

}  // namespace

int main() {
  measure(160, NR, 28, 1);
  for (const int64_t C : {160, 320, 640})
    for (const int64_t tiles : {32, 64, 128}) measure(C, C, tiles, 36);
}
