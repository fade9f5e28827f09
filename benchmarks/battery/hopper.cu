// What the Hopper kernels believe of the chip, asked of the chip itself: `hopper multiply|shift|supply|boxes`, a line
// of JSON a finding. Built by benchmarks/battery/hopper.py with the headers of csrc/cuda. Not run on a GPU yet.
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_fp16.h>

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

enum class Kind { bf16, fp16, bf16_mn_major, e4m3 };
// Reduction indices and bytes an element of one product.
constexpr int depth_of(Kind kind) {
  return kind == Kind::e4m3 ? 32 : 16;
}
constexpr int bytes_of(Kind kind) {
  return kind == Kind::e4m3 ? 1 : 2;
}

// One product of 64 x 160 from two images of shared memory, registers as they are.
template <Kind kind>
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
  if constexpr (kind == Kind::e4m3) {
    hw::wgmma_e4m3<kN>(d, a + base, b + base);
  } else {
    hw::wgmma<kN, kind == Kind::fp16, kind == Kind::bf16_mn_major>(d, a + base, b + base);
  }
  hw::wgmma_commit();
  hw::wgmma_wait<0>();
  hw::pin(d);
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) out[threadIdx.x * (kN / 2) + i] = d[i];
}

// How an operand of `rows` x 16 lies in shared memory. used: by a kernel of csrc/cuda.
struct Layout {
  const char* name;
  Swizzle swizzle;
  bool mn_major;
  uint32_t lbo, sbo;
  bool used;
};

uint32_t byte_of(const Layout& l, int row, int k, int bytes) {
  const int span = swizzle_span(l.swizzle), t = span / 2;
  const bool none = l.swizzle == Swizzle::none;
  if (l.mn_major && none) return row % 8 * 2 + row / 8 * l.sbo + k % 8 * 16 + k / 8 * l.lbo;
  if (l.mn_major) return row % t * 2 + row / t * l.lbo + k % 8 * 2 * t + k / 8 * l.sbo;
  if (none) return row % 8 * 16 + row / 8 * l.sbo + k / 8 * l.lbo + k % 8 * 2;
  return row % 8 * span + row / 8 * l.sbo + bytes * k;
}

// The bits of a whole number from -4 to 4.
uint16_t bits_of(Kind kind, int v) {
  const uint16_t sign = v < 0, size = static_cast<uint16_t>(v < 0 ? -v : v);
  constexpr uint16_t kE4m3[5] = {0, 0x38, 0x40, 0x44, 0x48};
  if (kind == Kind::e4m3) return static_cast<uint16_t>(sign << 7 | kE4m3[size]);
  if (kind == Kind::fp16) return __half_as_ushort(__float2half(static_cast<float>(v)));
  const float f = static_cast<float>(v);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return static_cast<uint16_t>(bits >> 16);
}

int value(int row, int k, int salt) {
  return (row * 7 + k * 5 + salt) % 9 - 4;
}

// Products of small integers: the number of wrong ones. `first` rows of A's image go before the ones that are read.
template <Kind kind>
int wrong_products(const Layout& a, const Layout& b, int first, uint64_t base_offset) {
  constexpr int kDepth = depth_of(kind), kBytes = bytes_of(kind);
  std::vector<uint8_t> images(2 * kHalf);
  const auto put = [&](const Layout& l, int half, int rows, int salt) {
    for (int row = 0; row < rows; ++row)
      for (int k = 0; k < kDepth; ++k) {
        const uint16_t bits = bits_of(kind, value(row, k, salt));
        std::memcpy(&images[half * kHalf + swizzled(byte_of(l, row, k, kBytes), l.swizzle)], &bits, kBytes);
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
  check(cudaFuncSetAttribute(multiply_once<kind>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  multiply_once<kind>
      <<<1, 128, kShared>>>(from, code(a, first * swizzle_span(a.swizzle)) | base_offset << 49, code(b, kHalf), to);
  check(cudaGetLastError());
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
      for (int k = 0; k < kDepth; ++k) want += value(first + row, k, 1) * value(column, k, 2);
      wrong += got[t * kN / 2 + i] != static_cast<float>(want);
    }
  return wrong;
}

template <Kind kind>
void report_layout(const char* type, const Layout& a, const Layout& b) {
  std::printf("{\"layout\": \"%s %s%s%s\", \"%s\": %d}\n", type, a.name, &a == &b ? "" : " by ", &a == &b ? "" : b.name,
              a.used && b.used ? "wrong" : "unused wrong", wrong_products<kind>(a, b, 0, 0));
}

// Every kind of operand against a plain product.
void multiply() {
  const Layout k128{"K-major 128B", Swizzle::b128, false, 16, 1024, true};
  const Layout k64{"K-major 64B", Swizzle::b64, false, 16, 512, false};
  const Layout k32{"K-major 32B", Swizzle::b32, false, 16, 256, false};
  const Layout k_none{"K-major none", Swizzle::none, false, 128, 256, false};
  for (const Layout& l : {k128, k64, k32, k_none}) report_layout<Kind::bf16>("bf16", l, l);
  report_layout<Kind::fp16>("fp16", k128, k128);
  report_layout<Kind::e4m3>("e4m3", k128, k128);
  // The next 64 (32) rows follow 16 reduction indices of these: LBO = 2 * SBO.
  const Layout m128{"MN-major 128B", Swizzle::b128, true, 2048, 1024, true};
  const Layout m64{"MN-major 64B", Swizzle::b64, true, 1024, 512, true};
  const Layout m_none{"MN-major none", Swizzle::none, true, 128, 256, false};
  for (const Layout& l : {m128, m64, m_none}) report_layout<Kind::bf16_mn_major>("bf16", l, l);
  report_layout<Kind::bf16_mn_major>("bf16", m128, m64);
}

// A start that is not on the swizzle's period: with base offset 0, and with the one of the PTX manual.
void shift() {
  const Layout l{"K-major 128B", Swizzle::b128, false, 16, 1024, true};
  for (int rows = 0; rows < 8; ++rows)
    std::printf("{\"rows\": %d, \"wrong with base offset 0\": %d, \"wrong with base offset rows\": %d}\n", rows,
                wrong_products<Kind::bf16>(l, l, rows, 0), wrong_products<Kind::bf16>(l, l, rows, rows));
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

// Two blocks that share what they fetch.
__device__ uint32_t rank_in_cluster() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ void arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
__device__ void load_box4_for_both(uint32_t to, const CUtensorMap* map, uint32_t barrier, int h) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %3, %4, %3}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(0), "r"(h), "h"(static_cast<uint16_t>(3))
      : "memory");
}

constexpr int kBoxRows = 128, kWidestRow = 288, kBoxSlot = kBoxRows * kWidestRow;

// One thread a block fetches boxes of kBoxRows rows of `bytes`; what counts is bytes a clock. pairs: either of two
// blocks fetches half of each box for both.
template <bool pairs>
__device__ void fetch_boxes(const CUtensorMap* map, int boxes, int rows, int bytes, long long* clocks) {
  const uint32_t ring = hw::shared_base(), full = ring + kSlots * kBoxSlot, empty = full + 8 * kSlots;
  const uint32_t rank = pairs ? rank_in_cluster() : 0, half = kBoxRows / 2 * bytes;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSlots; ++i) {
      hw::barrier_init(full + 8 * i, 1);
      hw::barrier_init(empty + 8 * i, 2);
    }
    hw::barrier_init_fence();
  }
  __syncwarp();
  if constexpr (pairs) sync_cluster();
  if (threadIdx.x == 0) {
    const long long begin = clock64();
    for (int i = 0; i < boxes + kSlots; ++i) {
      const int slot = i % kSlots, before = (i / kSlots - 1) & 1,
                row = (blockIdx.x / (pairs ? 2 : 1) * 37 + i) * 8 % rows;
      if (i >= kSlots) {
        hw::barrier_wait(full + 8 * slot, before);
        if constexpr (pairs) {
          arrive_at(empty + 8 * slot, 0);
          arrive_at(empty + 8 * slot, 1);
        }
      }
      if (i >= boxes) continue;
      // The other block writes here too, and this one there.
      if (pairs && i >= kSlots) hw::barrier_wait(empty + 8 * slot, before);
      hw::barrier_expect(full + 8 * slot, kBoxRows * bytes);
      if constexpr (pairs) {
        load_box4_for_both(ring + slot * kBoxSlot + rank * half, map, full + 8 * slot,
                           row + 4 * static_cast<int>(rank));
      } else {
        hw::load_box4(ring + slot * kBoxSlot, map, full + 8 * slot, 0, 0, row, 0);
      }
    }
    clocks[blockIdx.x] = clock64() - begin;
  }
  __syncwarp();
  // Until nobody arrives here any more.
  if constexpr (pairs) sync_cluster();
}
__global__ void __launch_bounds__(32, 1)
    box_loop(const __grid_constant__ CUtensorMap map, int boxes, int rows, int bytes, long long* clocks) {
  fetch_boxes<false>(&map, boxes, rows, bytes, clocks);
}
__global__ void __launch_bounds__(32, 1) __cluster_dims__(2, 1, 1)
    box_pair_loop(const __grid_constant__ CUtensorMap map, int boxes, int rows, int bytes, long long* clocks) {
  fetch_boxes<true>(&map, boxes, rows, bytes, clocks);
}

// The rate of boxes of 16 x 8 rows by the bytes of a row, out of L2, for one block and shared by two.
void boxes() {
  constexpr int kBoxes = 2000, kRows = 512, kBytes = kSlots * (kBoxSlot + 16);
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found));
  const auto encode = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  const int blocks = multiprocessors() & ~1;
  uint8_t* from = nullptr;
  long long* clocks = nullptr;
  check(cudaMalloc(&from, 16 * kRows * kWidestRow));
  check(cudaMallocManaged(&clocks, blocks * sizeof(long long)));
  for (const int bytes : {32, 64, 128, kWidestRow}) {
    for (const bool pairs : {false, true}) {
      const uint32_t elements = bytes / 2, high = pairs ? 4 : 8;
      const uint64_t dims[4] = {elements, 16, kRows, 1};
      const uint64_t row = bytes, image = 16ull * bytes, strides[3] = {row, image, image * kRows};
      const uint32_t box[4] = {elements, 16, high, 1}, steps[4] = {1, 1, 1, 1};
      const auto swizzle = bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                           : bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                           : bytes == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                         : CU_TENSOR_MAP_SWIZZLE_NONE;
      CUtensorMap map;
      if (!encode || encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, from, dims, strides, box, steps,
                            CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                            CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS) {
        std::fprintf(stderr, "cuTensorMapEncodeTiled failed\n");
        std::exit(1);
      }
      const auto kernel = pairs ? box_pair_loop : box_loop;
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
      kernel<<<blocks, 32, kBytes>>>(map, kBoxes, kRows - 8, bytes, clocks);
      check(cudaGetLastError());
      check(cudaDeviceSynchronize());
      double mean = 0.;
      for (int i = 0; i < blocks; ++i) mean += static_cast<double>(clocks[i]) / blocks;
      std::printf("{\"row bytes\": %d, \"blocks\": %d, \"B/clk\": %.1f}\n", bytes, pairs ? 2 : 1,
                  kBoxes * static_cast<double>(kBoxRows) * bytes / mean);
    }
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
