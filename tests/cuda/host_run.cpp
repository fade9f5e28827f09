// Whole kernels on the machine, for ctypes: the launchers' plans, with this tool in the place of the driver.
#include <cstdio>
#include <cstring>

#include "sm90_conv.cuh"
#include "sm90_wgrad.cuh"

namespace {

using namespace wrn_fast;
using namespace wrn_fast::sm90;

using Kernel = void (*)(const ConvParams<MapSpec>&);

// HOST_RUN_NARROW leaves a few kernels, for builds that are slow.
#ifdef HOST_RUN_NARROW
#define FETCH9(CASE) CASE(16, fetch9, 1, 1) CASE(32, fetch9, 1, 1)
#define SHIFT3(CASE) CASE(64, shift3, 2, 3)
#else
#define FETCH9 SM90_FETCH9
#define SHIFT3 SM90_SHIFT3
#endif

template <bool dgrad, bool e4m3, int block_k, int blocks, int taps>
Kernel kernel_of(DType dtype) {
  return dtype == DType::f16 ? conv_body<ConvTraits<dgrad, block_k, blocks, taps, true, e4m3>, ConvParams<MapSpec>>
                             : conv_body<ConvTraits<dgrad, block_k, blocks, taps, false, e4m3>, ConvParams<MapSpec>>;
}

template <bool dgrad, bool e4m3>
Kernel choose(int block_k, Sm90Tile tile, DType dtype) {
#define CASE(k, t, blocks, taps) \
  if (block_k == k && tile == Sm90Tile::t) return kernel_of<dgrad, e4m3, k, blocks, taps>(dtype);
  FETCH9(CASE)
  SHIFT3(CASE)
#undef CASE
  return nullptr;
}

int report(const std::string& error, char* message, int size) {
  std::snprintf(message, size, "%s", error.c_str());
  return !error.empty();
}

int run(host::Machine& m, Kernel kernel, const ConvParams<MapSpec>& p, int blocks, char* message, int size) {
  if (!kernel) return report("no such kernel", message, size);
  return report(m.run(blocks, kThreads, [&] { kernel(p); }), message, size);
}

using WgradKernel = void (*)(const WgradParams<MapSpec>&);

template <int block_k, bool halo>
WgradKernel wgrad_of(DType dtype) {
  return dtype == DType::f16 ? wgrad_body<WgradTraits<block_k, halo, true>, WgradParams<MapSpec>>
                             : wgrad_body<WgradTraits<block_k, halo, false>, WgradParams<MapSpec>>;
}

WgradKernel choose_wgrad(int block_k, bool halo, DType dtype) {
#define CASE(k, tile, blocks, taps) \
  if (block_k == k) return halo ? wgrad_of<k, true>(dtype) : wgrad_of<k, false>(dtype);
  FETCH9(CASE)
#undef CASE
  return nullptr;
}

int64_t pixels(const ConvShape& s) {
  return s.N * s.P * s.Q;
}

}  // namespace

extern "C" {

int host_fprop(const Sm90Fprop* f, uint64_t seed, int blocks, char* message, int size) {
  host::Machine m(seed);
  const ConvShape& s = f->shape;
  const int bytes = f->factor ? 1 : 2;
  m.allow(f->x, s.N * s.H * s.W * s.C * bytes);
  m.allow(f->x_short, s.N * f->short_H * f->short_W * f->short_C * bytes);
  m.allow(f->w, packed_bytes(s.K, s.C, s.R, s.S, f->factor));
  m.allow(f->w_short, packed_bytes(s.K, f->short_C, 1, 1, f->factor));
  for (const void* v : {f->residual, static_cast<const void*>(f->y), static_cast<const void*>(f->y_act)}) {
    m.allow(v, pixels(s) * s.K * 2);
  }
  const int block_k = block_k_of(s.K);
  const Kernel kernel = (f->factor ? choose<false, true> : choose<false, false>)(block_k, f->tile, f->dtype);
  return run(m, kernel, fprop_params(*f), blocks, message, size);
}

int host_dgrad(const Sm90Dgrad* d, uint64_t seed, int blocks, char* message, int size) {
  host::Machine m(seed);
  const ConvShape& s = d->shape;
  m.allow(d->dy, pixels(s) * s.K * 2);
  m.allow(d->w, packed_bytes(s.C, s.K, s.R, s.S));
  m.allow(d->x, s.N * s.H * s.W * s.C * 2);
  m.allow(d->g, s.N * s.H * s.W * s.C * 2);
  return run(m, choose<true, false>(block_k_of(s.C), d->tile, d->dtype), dgrad_params(*d), blocks, message, size);
}

int host_wgrad(const Sm90Wgrad* w, uint64_t seed, int multiprocessors, char* message, int size) {
  host::Machine m(seed);
  const ConvShape& s = w->shape;
  m.allow(w->dy, pixels(s) * s.K * 2);
  m.allow(w->x, s.N * s.H * s.W * s.C * 2);
  const WgradParams<MapSpec> p = wgrad_params(*w, multiprocessors);
  const WgradKernel kernel = choose_wgrad(block_k_of(s.K), wgrad_halo(s, p.schedule.tile), w->dtype);
  if (!kernel) return report("no such kernel", message, size);
  const std::string wrong = m.run(wgrad_jobs(p.grid), kWgradThreads, [&] { kernel(p); });
  if (wrong.empty() && p.grid.splits > 1) {
    for (int64_t i = 0; i < slab_size(s); ++i) w->dw[i] = sum_slabs(p.slabs, p.grid.splits, slab_size(s), i);
  }
  return report(wrong, message, size);
}

int64_t host_wgrad_workspace(const ConvShape* s, int multiprocessors) {
  return wgrad_workspace(*s, multiprocessors);
}

int64_t host_partial_bytes(const ConvShape* s, int dgrad, int splits) {
  return partial_bytes(*s, dgrad, splits);
}
int64_t host_counters(const ConvShape* s, int dgrad) {
  return split_blocks(*s, dgrad);
}

int64_t host_parts(const ConvShape* s, int dgrad, int tile) {
  return parts_of(*s, dgrad, static_cast<Sm90Tile>(tile));
}

const char* host_refuses(const char* op, const ConvShape* s, int dtype, int tile) {
  return refuses(op, *s, static_cast<DType>(dtype), static_cast<Sm90Tile>(tile));
}

// w [K,R,S,C] (transpose: [C,R,S,K]) of numbers of so many bytes to the packed image.
void host_pack(const char* w, int64_t K, int64_t C, int R, int S, int transpose, int bytes, char* out) {
  std::memset(out, 0, packed_bytes(K, C, R, S, bytes == 1));
  for (int64_t k = 0; k < K; ++k) {
    for (int r = 0; r < R; ++r) {
      for (int s = 0; s < S; ++s) {
        for (int64_t c = 0; c < C; ++c) {
          const int64_t from = transpose ? ((c * R + r) * S + s) * K + k : ((k * R + r) * S + s) * C + c;
          std::memcpy(out + packed_offset(K, C, R, S, k, r, s, c, kRowBytes / bytes), w + from * bytes, bytes);
        }
      }
    }
  }
}
int64_t host_packed_bytes(int64_t K, int64_t C, int R, int S, int bytes) {
  return packed_bytes(K, C, R, S, bytes == 1);
}
int host_sizes(int which) {
  return which == 0   ? sizeof(Sm90Fprop)
         : which == 1 ? sizeof(Sm90Dgrad)
         : which == 2 ? sizeof(ConvShape)
                      : sizeof(Sm90Wgrad);
}
}
