// The hardware layer of csrc/cuda/sm90_hw.cuh for a CPU: every call goes to the machine that runs the block.
#pragma once

#include <cmath>
#include <cstring>

#include "machine.h"

#define SM90_FN inline
#define SM90_GRID_CONSTANT

namespace wrn_fast {
namespace sm90 {
namespace hw {

using Map = MapSpec;
using host::machine;

constexpr int kWarpKey = 16, kGroupKey = 64;  // meetings: named barriers are 0 to 15

inline int thread() {
  return machine->thread();
}
inline int block() {
  return machine->block();
}
inline int blocks() {
  return machine->blocks();
}
inline int warp_uniform(int v) {
  return v;
}
inline int fresh(int v) {
  return v;
}
inline uint32_t shared_base() {
  return host::kSharedBase;
}

inline void barrier_init(uint32_t barrier, int count) {
  machine->barrier_init(barrier, count);
}
inline void barrier_init_fence() {}
inline void barrier_arrive(uint32_t barrier) {
  machine->barrier_arrive(barrier, 0);
}
inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  machine->barrier_arrive(barrier, bytes);
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  machine->barrier_wait(barrier, parity);
}
inline void sync_block() {
  machine->meet(0, machine->threads(), true);
}
inline void sync_warp() {
  machine->meet(kWarpKey + thread() / 32, 32, true);
}
template <int id, int threads>
inline void sync_named() {
  machine->meet(id, threads, true);
}
inline void fence_async() {
  machine->fence_async();
}
template <int count>
inline void registers_up() {}
template <int count>
inline void registers_down() {}

inline void wait_for_prior_grid() {
  machine->wait_for_prior_grid();
}
inline void let_next_grid_start() {}

inline void prefetch_map(const Map*) {}
inline void load_box4(uint32_t to, const Map* map, uint32_t barrier, int c, int w, int h, int n) {
  machine->load_box(to, *map, barrier, {c, w, h, n, 0});
}
inline void load_box5(uint32_t to, const Map* map, uint32_t barrier, int c, int w, int h, int n, int plane) {
  machine->load_box(to, *map, barrier, {c, w, h, n, plane});
}
inline void load_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  machine->load_bytes(to, from, bytes, barrier);
}
inline void store_box5(const Map* map, uint32_t from, int c, int w, int h, int n, int plane) {
  machine->store_box(*map, from, {c, w, h, n, plane});
}
inline void store_commit() {
  machine->store_commit();
}
inline void store_wait_read() {
  machine->store_wait_read();
}

template <int n>
inline void pin(float (&)[n]) {}
inline void wgmma_fence() {
  machine->order_products();
}
inline void wgmma_commit() {
  machine->commit_products();
}
template <int pending>
inline void wgmma_wait() {
  machine->wait_products(pending);
}
template <int N, bool fp16, bool transpose>
inline void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b) {
  machine->product(N, fp16 ? host::Format::fp16 : host::Format::bf16, transpose, d, a, b);
}
template <int N>
inline void wgmma_e4m3(float (&d)[N / 2], uint64_t a, uint64_t b) {
  machine->product(N, host::Format::e4m3, false, d, a, b);
}

struct Vector {
  uint32_t word[4];
};
inline Vector load_vector(uint32_t address) {
  Vector v;
  machine->read(address, v.word, 16);
  return v;
}
inline void store_vector(uint32_t address, const Vector& v) {
  machine->write(address, v.word, 16);
}
inline uint32_t load_word(uint32_t address) {
  uint32_t v;
  machine->read(address, &v, 4);
  return v;
}
inline float load_float(uint32_t address) {
  float v;
  machine->read(address, &v, 4);
  return v;
}
inline void store_word(uint32_t address, uint32_t v) {
  machine->write(address, &v, 4);
}
inline void store_float(uint32_t address, float v) {
  machine->write(address, &v, 4);
}

// Lane l gives the address of row l % 8 of matrix l / 8, and holds elements 2 (l % 4) and the next of row l / 4.
inline void store_matrices(uint32_t row_address, const Vector& v) {
  const int lane = thread() % 32, key = kWarpKey + thread() / 32;
  host::Meeting& m = machine->meeting(key);
  auto& words = m.words[m.generation & 1];
  for (int i = 0; i < 4; ++i) words[lane][i] = v.word[i];
  machine->meet(key, 32, false);
  uint32_t row[4];
  for (int i = 0; i < 4; ++i) row[i] = words[lane % 8 * 4 + i][lane / 8];
  machine->write(row_address, row, 16);
}
inline float shuffle(float v, int lane) {
  const int key = kWarpKey + thread() / 32;
  host::Meeting& m = machine->meeting(key);
  auto& values = m.values[m.generation & 1];
  values[thread() % 32] = v;
  machine->meet(key, 32, false);
  return values[lane];
}
inline float shuffle_xor(float v, int mask) {
  return shuffle(v, thread() % 32 ^ mask);
}

uint16_t to_bf16(float v);
uint16_t to_fp16(float v);
float from_bf16(uint16_t v);
float from_fp16(uint16_t v);

template <bool fp16>
inline uint32_t pack(float low, float high) {
  return fp16 ? to_fp16(low) | to_fp16(high) << 16 : to_bf16(low) | static_cast<uint32_t>(to_bf16(high)) << 16;
}
template <bool fp16>
inline float low_half(uint32_t v) {
  return fp16 ? from_fp16(v & 0xffff) : from_bf16(v & 0xffff);
}
template <bool fp16>
inline float high_half(uint32_t v) {
  return fp16 ? from_fp16(v >> 16) : from_bf16(v >> 16);
}
inline float max_nan(float a, float b) {
  return a != a || b != b ? NAN : a > b ? a : b;
}
inline float exponential(float v) {
  return std::exp(v);
}
inline float reciprocal(float v) {
  return 1.f / v;
}
inline float fused(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline void fence_global() {}
inline int count_up(int* counter) {
  return (*counter)++;
}
inline float from_other_block(const float* p) {
  return *p;
}
template <class T>
inline T from_global(const T* p) {
  return *p;
}

}  // namespace hw
}  // namespace sm90
}  // namespace wrn_fast
