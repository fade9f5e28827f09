// What the Hopper kernels believe of the chip, asked of the chip itself: `hopper multiply|shift|supply|boxes`, a line
// of JSON a finding. Built by benchmarks/battery/hopper.py with the headers of csrc/cuda. Not run on a GPU yet.
#include <cuda.h>
#include <cudaTypedefs.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/sm90_hw.cuh"
#include "cuda/sm90_index.h"

namespace {

using namespace wrn_fast::sm90;

constexpr int kN = 160, kHalf = 32768, kShared = 2 * kHalf + 64;

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(status));
  std::exit(1);
}

// One 64 x 160 x 16 product from two images of shared memory, registers as they are.
template <bool transpose>
__global__ void __launch_bounds__(128, 1) multiply_once(const uint4* images, uint64_t a, uint64_t b, float* out) {
  extern __shared__ __align__(1024) uint8_t memory[];
  for (int i = threadIdx.x; i < 2 * kHalf / 16; i += 128) reinterpret_cast<uint4*>(memory)[i] = images[i];
  hw::fence_async();
  __syncthreads();
  float d[kN / 2];
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) d[i] = 0.f;
  const uint64_t base = hw::shared_base() >> 4;
  hw::pin(d);
  hw::wgmma_fence();
  hw::wgmma<kN, false, transpose>(d, a + base, b + base);
  hw::wgmma_commit();
  hw::wgmma_wait<0>();
  hw::pin(d);
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) out[threadIdx.x * (kN / 2) + i] = d[i];
}

// How an operand of `rows` x 16 lies in shared memory.
struct Layout {
  const char* name;
  Swizzle swizzle;
  bool mn_major;
  uint32_t lbo, sbo;
};

uint32_t byte_of(const Layout& l, int row, int k) {
  const int span = swizzle_span(l.swizzle);
  if (l.mn_major) {
    const int t = span / 2;
    return row % t * 2 + row / t * l.lbo + k % 8 * 2 * t + k / 8 * l.sbo;
  }
  if (l.swizzle == Swizzle::none) return row % 8 * 16 + row / 8 * l.sbo + k / 8 * l.lbo + k % 8 * 2;
  return row % 8 * span + row / 8 * l.sbo + 2 * k;
}

uint16_t bf16(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return static_cast<uint16_t>(bits >> 16);
}

int value(int row, int k, int salt) {
  return (row * 7 + k * 5 + salt) % 9 - 4;
}

// Products of small integers: the number of wrong ones. `first` rows of A's image go before the ones that are read.
template <bool transpose>
int wrong_products(const Layout& a, const Layout& b, int first, uint64_t base_offset) {
  std::vector<uint8_t> images(2 * kHalf);
  const auto put = [&](const Layout& l, int half, int rows, int salt) {
    for (int row = 0; row < rows; ++row)
      for (int k = 0; k < 16; ++k) {
        const uint16_t bits = bf16(static_cast<float>(value(row, k, salt)));
        std::memcpy(&images[half * kHalf + swizzled(byte_of(l, row, k), l.swizzle)], &bits, 2);
      }
  };
  put(a, 0, 64 + first, 1);
  put(b, 1, kN, 2);
  const auto code = [](const Layout& l, uint32_t start) { return descriptor(start, l.lbo, l.sbo, l.swizzle); };
  uint4* from = nullptr;
  float* to = nullptr;
  check(cudaMalloc(&from, images.size()));
  check(cudaMalloc(&to, 128 * kN / 2 * sizeof(float)));
  check(cudaMemcpy(from, images.data(), images.size(), cudaMemcpyHostToDevice));
  check(cudaFuncSetAttribute(multiply_once<transpose>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  multiply_once<transpose>
      <<<1, 128, kShared>>>(from, code(a, first * swizzle_span(a.swizzle)) | base_offset << 49, code(b, kHalf), to);
  check(cudaDeviceSynchronize());
  std::vector<float> got(128 * kN / 2);
  check(cudaMemcpy(got.data(), to, got.size() * sizeof(float), cudaMemcpyDeviceToHost));
  check(cudaFree(from));
  check(cudaFree(to));
  int wrong = 0;
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < kN / 2; ++i) {
      const int row = acc_row(t / 32, t % 32, i), column = acc_column(t % 32, i);
      int want = 0;
      for (int k = 0; k < 16; ++k) want += value(first + row, k, 1) * value(column, k, 2);
      wrong += got[t * kN / 2 + i] != static_cast<float>(want);
    }
  return wrong;
}

// Every kind of operand against a plain product.
void multiply() {
  const Layout k128{"K-major 128B", Swizzle::b128, false, 16, 1024}, k64{"K-major 64B", Swizzle::b64, false, 16, 512};
  const Layout k32{"K-major 32B", Swizzle::b32, false, 16, 256}, plain{"K-major none", Swizzle::none, false, 128, 256};
  for (const Layout& l : {k128, k64, k32, plain})
    std::printf("{\"layout\": \"%s\", \"wrong\": %d}\n", l.name, wrong_products<false>(l, l, 0, 0));
  // The next 64 (32) rows follow 16 reduction indices of these: LBO = 2 * SBO.
  const Layout m128{"MN-major 128B", Swizzle::b128, true, 2048, 1024},
      m64{"MN-major 64B", Swizzle::b64, true, 1024, 512};
  std::printf("{\"layout\": \"%s\", \"wrong\": %d}\n", m128.name, wrong_products<true>(m128, m128, 0, 0));
  std::printf("{\"layout\": \"%s\", \"wrong\": %d}\n", m64.name, wrong_products<true>(m64, m64, 0, 0));
  std::printf("{\"layout\": \"MN-major 128B and 64B\", \"wrong\": %d}\n", wrong_products<true>(m128, m64, 0, 0));
}

// A start that is not on the swizzle's period: with base offset 0, and with the one of the PTX manual.
void shift() {
  const Layout l{"K-major 128B", Swizzle::b128, false, 16, 1024};
  for (int rows = 0; rows < 8; ++rows)
    std::printf("{\"rows\": %d, \"wrong with base offset 0\": %d, \"wrong with base offset rows\": %d}\n", rows,
                wrong_products<false>(l, l, rows, 0), wrong_products<false>(l, l, rows, rows));
}

constexpr int kSlots = 4, kFill = 20480, kOperands = 65536;

// Two warpgroups multiply 128 x 160 each from the same operands; one thread fills other memory at `rate` bytes a clock.
__global__ void __launch_bounds__(384, 1)
    supply_loop(const uint8_t* from, int span, int batches, int rate, long long* clocks, long long* filled) {
  const uint32_t shared = hw::shared_base(), ring = shared + kOperands, barriers = ring + kSlots * kFill;
  if (threadIdx.x == 0)
    for (int i = 0; i < kSlots; ++i) hw::barrier_init(barriers + 8 * i, 1);
  hw::barrier_init_fence();
  __syncthreads();
  const long long begin = clock64();
  if (threadIdx.x < 128) {
    hw::registers_down<56>();
    if (threadIdx.x > 0 || rate == 0) return;
    // As long as the multiplication takes at its full rate: 8 instructions of 80 clocks for both warpgroups' halves.
    const long long length = static_cast<long long>(batches) * 2 * 8 * 80;
    long long sent = 0, offset = blockIdx.x * 65536ll % span;
    for (int i = 0; clock64() - begin < length; ++i) {
      while ((clock64() - begin) * rate < sent) {
      }
      const uint32_t barrier = barriers + 8 * (i % kSlots);
      if (i >= kSlots) hw::barrier_wait(barrier, (i / kSlots - 1) & 1);
      hw::barrier_expect(barrier, kFill);
      hw::load_bytes(ring + i % kSlots * kFill, from + offset, kFill, barrier);
      offset = (offset + kFill) % (span - kFill);
      offset -= offset % 16;
      sent += kFill;
    }
    for (int i = 0; i < kSlots; ++i) {
      const long long loads = sent / kFill - i, mine = loads <= 0 ? 0 : (loads + kSlots - 1) / kSlots;
      if (mine > 0) hw::barrier_wait(barriers + 8 * i, (mine - 1) & 1);
    }
    filled[blockIdx.x] = sent;
    return;
  }
  hw::registers_up<224>();
  const int group = threadIdx.x / 128 - 1;
  const uint64_t a = row_descriptor(shared + group * 16384), b = row_descriptor(shared + 32768);
  float d[2][kN / 2];
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) d[m][i] = 0.f;
  for (int batch = 0; batch < batches; ++batch) {
    hw::pin(d[0]);
    hw::pin(d[1]);
    hw::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      hw::wgmma<kN, false, false>(d[0], descriptor_plus(a, 32 * k), descriptor_plus(b, 32 * k));
      hw::wgmma<kN, false, false>(d[1], descriptor_plus(a, 8192 + 32 * k), descriptor_plus(b, 32 * k));
    }
    hw::wgmma_commit();
    hw::wgmma_wait<0>();
    hw::pin(d[0]);
    hw::pin(d[1]);
  }
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) sum += d[0][i] + d[1][i];
  if (threadIdx.x == 128) clocks[blockIdx.x] = clock64() - begin;
  if (sum == 12345.f) clocks[blockIdx.x] = 0;
}

int multiprocessors() {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0));
  return count;
}

// Tensor clocks an instruction, alone and with shared memory being filled.
void supply() {
  constexpr int kBatches = 4000, kSpan = 16 << 20, kBytes = kOperands + kSlots * kFill + 64;
  const int blocks = multiprocessors();
  uint8_t* from = nullptr;
  long long *clocks = nullptr, *filled = nullptr;
  check(cudaMalloc(&from, kSpan));
  check(cudaMemset(from, 0, kSpan));
  check(cudaMallocManaged(&clocks, blocks * sizeof(long long)));
  check(cudaMallocManaged(&filled, blocks * sizeof(long long)));
  check(cudaFuncSetAttribute(supply_loop, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  for (const int rate : {0, 20, 30, 40, 60, 80}) {
    for (int i = 0; i < blocks; ++i) clocks[i] = filled[i] = 0;
    supply_loop<<<blocks, 384, kBytes>>>(from, kSpan, kBatches, rate, clocks, filled);
    check(cudaDeviceSynchronize());
    double mean = 0., bytes = 0.;
    for (int i = 0; i < blocks; ++i) {
      mean += static_cast<double>(clocks[i]) / blocks;
      bytes += static_cast<double>(filled[i]) / blocks;
    }
    std::printf("{\"asked B/clk\": %d, \"filled B/clk\": %.1f, \"clk per m64n160k16\": %.1f}\n", rate, bytes / mean,
                mean / (kBatches * 2. * 8.));
  }
}

// One thread a block fetches boxes of 128 rows; what counts is bytes a clock.
__global__ void __launch_bounds__(32, 1)
    box_loop(const __grid_constant__ CUtensorMap map, int boxes, int rows, int bytes, long long* clocks) {
  const uint32_t ring = hw::shared_base(), barriers = ring + kSlots * 16384;
  if (threadIdx.x > 0) return;
  for (int i = 0; i < kSlots; ++i) hw::barrier_init(barriers + 8 * i, 1);
  hw::barrier_init_fence();
  const long long begin = clock64();
  for (int i = 0; i < boxes + kSlots; ++i) {
    const uint32_t barrier = barriers + 8 * (i % kSlots);
    if (i >= kSlots) hw::barrier_wait(barrier, (i / kSlots - 1) & 1);
    if (i >= boxes) continue;
    hw::barrier_expect(barrier, bytes);
    hw::load_box4(ring + i % kSlots * 16384, &map, barrier, 0, 0, (blockIdx.x * 37 + i) * 8 % rows, 0);
  }
  clocks[blockIdx.x] = clock64() - begin;
}

// The rate of boxes of 16 x 8 pixels by the bytes of a pixel, out of L2.
void boxes() {
  constexpr int kBoxes = 2000, kRows = 512, kBytes = kSlots * 16384 + 64;
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found));
  const auto encode = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  const int blocks = multiprocessors();
  uint8_t* from = nullptr;
  long long* clocks = nullptr;
  check(cudaMalloc(&from, 16 * kRows * 128));
  check(cudaMallocManaged(&clocks, blocks * sizeof(long long)));
  check(cudaFuncSetAttribute(box_loop, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  for (const int pixel : {32, 64, 128}) {
    const uint64_t dims[4] = {static_cast<uint64_t>(pixel / 2), 16, kRows, 1};
    const uint64_t row = pixel, image = 16ull * pixel, strides[3] = {row, image, image * kRows};
    const uint32_t box[4] = {static_cast<uint32_t>(pixel / 2), 16, 8, 1}, steps[4] = {1, 1, 1, 1};
    const auto swizzle = pixel == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                         : pixel == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                       : CU_TENSOR_MAP_SWIZZLE_32B;
    CUtensorMap map;
    if (!encode || encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, from, dims, strides, box, steps,
                          CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS) {
      std::fprintf(stderr, "cuTensorMapEncodeTiled failed\n");
      std::exit(1);
    }
    box_loop<<<blocks, 32, kBytes>>>(map, kBoxes, kRows - 8, 128 * pixel, clocks);
    check(cudaDeviceSynchronize());
    double mean = 0.;
    for (int i = 0; i < blocks; ++i) mean += static_cast<double>(clocks[i]) / blocks;
    std::printf("{\"bytes of a pixel\": %d, \"B/clk\": %.1f}\n", pixel, kBoxes * 128. * pixel / mean);
  }
}

}  // namespace

int main(int count, char** words) {
  const std::string what = count == 2 ? words[1] : "";
  if (what == "multiply")
    multiply();
  else if (what == "shift")
    shift();
  else if (what == "supply")
    supply();
  else if (what == "boxes")
    boxes();
  else
    return std::fprintf(stderr, "hopper multiply|shift|supply|boxes\n"), 2;
  return 0;
}
