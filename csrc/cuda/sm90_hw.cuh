// What the Hopper kernels ask of the hardware, one small function each. Not run on a GPU yet.
//
// Compiled by anything but nvcc, the same names come from tests/cuda/host_hw.h, which runs whole kernels on a CPU.
#pragma once

#ifndef __CUDACC__
#include "host_hw.h"
#else

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "sm90_wgmma.cuh"

#define SM90_FN __device__ __forceinline__
#define SM90_GRID_CONSTANT __grid_constant__

namespace wrn_fast {
namespace sm90 {
namespace hw {

using Map = CUtensorMap;

SM90_FN int thread() {
  return static_cast<int>(threadIdx.x);
}
SM90_FN int block() {
  return static_cast<int>(blockIdx.x);
}
SM90_FN int blocks() {
  return static_cast<int>(gridDim.x);
}
// The same value in all lanes, so that the compiler knows branches on it to be uniform.
SM90_FN int warp_uniform(int v) {
  return __shfl_sync(0xffffffffu, v, 0);
}

// The same value, of which the compiler knows nothing: what is computed from it is not computed early and kept.
SM90_FN int fresh(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// Start of the block's dynamic shared memory, which the swizzles need on a 1024-byte boundary.
SM90_FN uint32_t shared_base() {
  extern __shared__ __align__(1024) uint8_t memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}

// Barriers.
SM90_FN void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
SM90_FN void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
SM90_FN void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
SM90_FN void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
SM90_FN void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
      "@done bra ready;\nbra again;\nready:\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
SM90_FN void sync_block() {
  __syncthreads();
}
SM90_FN void sync_warp() {
  __syncwarp();
}
// Named barrier `id`: a constant, or the compiler reserves all 16.
template <int id, int threads>
SM90_FN void sync_named() {
  asm volatile("bar.sync %0, %1;" ::"n"(id), "n"(threads) : "memory");
}
// Makes this thread's shared-memory writes visible to TMA and wgmma.
SM90_FN void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

template <int count>
SM90_FN void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
SM90_FN void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

// Programmatic dependent launch; both do nothing in a launch without it.
SM90_FN void wait_for_prior_grid() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
SM90_FN void let_next_grid_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Bulk copies.
SM90_FN void prefetch_map(const Map* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
SM90_FN void load_box4(uint32_t to, const Map* map, uint32_t barrier, int c, int w, int h, int n) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(n)
      : "memory");
}
SM90_FN void load_box5(uint32_t to, const Map* map, uint32_t barrier, int c, int w, int h, int n, int plane) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, "
      "%7}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(n), "r"(plane)
      : "memory");
}
SM90_FN void load_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
SM90_FN void store_box5(const Map* map, uint32_t from, int c, int w, int h, int n, int plane) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
      "r"(from), "r"(c), "r"(w), "r"(h), "r"(n), "r"(plane)
      : "memory");
}
SM90_FN void store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until this thread's stores have read their shared memory.
SM90_FN void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Matrix products. An accumulator may not be touched between wgmma_fence and wgmma_wait: the pins hold it in place.
template <int n>
SM90_FN void pin(float (&d)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
SM90_FN void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
SM90_FN void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int pending>
SM90_FN void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
template <int N, bool fp16, bool transpose>
SM90_FN void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b) {
  Wgmma<N, fp16, transpose>::issue(d, a, b);
}

template <int N>
SM90_FN void wgmma_e4m3(float (&d)[N / 2], uint64_t a, uint64_t b) {
  WgmmaE4m3<N>::issue(d, a, b);
}

// Shared memory by address.
struct Vector {
  uint32_t word[4];
};
SM90_FN Vector load_vector(uint32_t address) {
  Vector v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(address)
               : "memory");
  return v;
}
SM90_FN void store_vector(uint32_t address, const Vector& v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.word[0]), "r"(v.word[1]),
               "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}
SM90_FN uint32_t load_word(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
SM90_FN float load_float(uint32_t address) {
  return __uint_as_float(load_word(address));
}
SM90_FN void store_word(uint32_t address, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
SM90_FN void store_float(uint32_t address, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}
SM90_FN void store_matrices(uint32_t row_address, const Vector& v) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address), "r"(v.word[0]),
               "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

SM90_FN float shuffle_xor(float v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
SM90_FN float shuffle(float v, int lane) {
  return __shfl_sync(0xffffffffu, v, lane);
}

// Values. Two 16-bit numbers a word, the lower address in the lower half.
template <bool fp16>
SM90_FN uint32_t pack(float low, float high) {
  if constexpr (fp16) {
    const __half2 v = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  } else {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
}
template <bool fp16>
SM90_FN float low_half(uint32_t v) {
  if constexpr (fp16) return __half2float(__ushort_as_half(static_cast<unsigned short>(v)));
  return __uint_as_float(v << 16);
}
template <bool fp16>
SM90_FN float high_half(uint32_t v) {
  if constexpr (fp16) return __half2float(__ushort_as_half(static_cast<unsigned short>(v >> 16)));
  return __uint_as_float(v & 0xffff0000u);
}
// The greater one; NaN if either is.
SM90_FN float max_nan(float a, float b) {
  float v;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
  return v;
}
SM90_FN float reciprocal(float v) {
  float r;
  asm("rcp.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
SM90_FN float exponential(float v) {
  return __expf(v);
}
SM90_FN float fused(float a, float b, float c) {
  return fmaf(a, b, c);
}
// Between blocks: what was written before the fence and the count is there for whoever counts later.
SM90_FN void fence_global() {
  __threadfence();
}
SM90_FN int count_up(int* counter) {
  return atomicAdd(counter, 1);
}
SM90_FN float from_other_block(const float* p) {
  return __ldcg(p);
}
SM90_FN float from_global(const float* p) {
  return __ldg(p);
}
SM90_FN int64_t from_global(const int64_t* p) {
  return __ldg(reinterpret_cast<const long long*>(p));
}

}  // namespace hw
}  // namespace sm90
}  // namespace wrn_fast

#endif
