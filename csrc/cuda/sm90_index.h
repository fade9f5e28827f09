// Every address, box, descriptor, mask, ring and schedule computation of the Hopper kernels, as constexpr functions
// that kernels, launchers and tests share. tests/cuda checks them against brute force for every shipped configuration.
//
// Words: a tap is one filter position; a chunk is 64 channels of the reduction; a part is 64 pixels of a tile, for
// which sums are written. A pixel tile's row i is its pixel i in (n, p, q) order.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define SM90_HD __host__ __device__ constexpr
#else
#define SM90_HD constexpr
#endif

namespace wrn_fast {
namespace sm90 {

constexpr int kChunk = 64;                     // channels of 16 bits: 128 bytes, the widest swizzle
constexpr int kChunk8 = 128;                   // channels of 8 bits (e4m3)
constexpr int kRowBytes = 128;                 // of one pixel or one filter in a chunk
constexpr int kWarpgroup = 128;                // threads
constexpr int kConsumers = 2;                  // warpgroups
constexpr int kThreads = 3 * kWarpgroup;       // producer warpgroup first
constexpr int kTransformers = 64;              // last threads of the producer warpgroup: prologue, dropout mask
constexpr int kSharedMax = 232448;             // bytes a block may have
constexpr int kRegistersMax = 168 * kThreads;  // what the launch gives, to be shared out by setmaxnreg

// Swizzles: XOR of address bits 4.. with bits 7.., the same in TMA and wgmma. The values are wgmma's codes.
enum class Swizzle : int { none = 0, b128 = 1, b64 = 2, b32 = 3 };

SM90_HD int swizzle_span(Swizzle s) {
  return s == Swizzle::b128 ? 128 : s == Swizzle::b64 ? 64 : s == Swizzle::b32 ? 32 : 16;
}
SM90_HD uint32_t swizzled(uint32_t address, Swizzle s) {
  return address ^ (((address >> 7) & (swizzle_span(s) / 16 - 1)) << 4);
}

// wgmma's 64-bit matrix descriptor. start must lie on the swizzle's period (8 rows of its span).
SM90_HD uint64_t descriptor(uint32_t start, uint32_t lbo, uint32_t sbo, Swizzle s) {
  return static_cast<uint64_t>((start & 0x3FFFF) >> 4) | static_cast<uint64_t>(lbo >> 4) << 16 |
         static_cast<uint64_t>(sbo >> 4) << 32 | static_cast<uint64_t>(s) << 62;
}
// K-major rows of 128 bytes, 8 rows a kilobyte. The next 16 reduction indices are 32 bytes on.
SM90_HD uint64_t row_descriptor(uint32_t start) {
  return descriptor(start, 16, 8 * kRowBytes, Swizzle::b128);
}
SM90_HD uint64_t descriptor_plus(uint64_t d, uint32_t bytes) {
  return d + (bytes >> 4);
}

// Accumulator register `reg` of m64nN: its row among 64 and its column.
SM90_HD int acc_row(int warp, int lane, int reg) {
  return 16 * warp + lane / 4 + 8 * ((reg >> 1) & 1);
}
SM90_HD int acc_column(int lane, int reg) {
  return 8 * (reg >> 2) + 2 * (lane & 3) + (reg & 1);
}
// Register of (8-column group j, row half h, column bit b).
SM90_HD int acc_reg(int j, int h, int b) {
  return 4 * j + 2 * h + b;
}

// Column sums leave a warp by a halving exchange over the 8 lanes that hold one column, 4 columns of each lane at a
// time: a group of 16 channels. Afterwards lanes l and l ^ 4 hold the sum of this channel of group g.
SM90_HD int sum_channel(int g, int lane) {
  const int c = lane >> 3 & 3;
  return 8 * (2 * g + c / 2) + 2 * (lane & 3) + (c & 1);
}

// Pixels of a tile: 2^q_log x 2^p_log x n, 64 rows a power of two of which make a box again.
struct PixelTile {
  int q_log = 0, p_log = 0, n = 1;
};
struct Pixel {
  int q = 0, p = 0, n = 0;
};
SM90_HD int least(int a, int b) {
  return a < b ? a : b;
}
SM90_HD int most(int a, int b) {
  return a > b ? a : b;
}
SM90_HD int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

SM90_HD int width_of(PixelTile t) {
  return 1 << t.q_log;
}
SM90_HD int height_of(PixelTile t) {
  return 1 << t.p_log;
}
SM90_HD int rows_of(PixelTile t) {
  return t.n << (t.q_log + t.p_log);
}
SM90_HD Pixel pixel_of_row(PixelTile t, int row) {
  return {row & (width_of(t) - 1), (row >> t.q_log) & (height_of(t) - 1), row >> (t.q_log + t.p_log)};
}
// The aligned run of 2^rows_log rows is a box again.
SM90_HD PixelTile sub_tile(PixelTile t, int rows_log) {
  const int q = least(t.q_log, rows_log), p = least(t.p_log, rows_log - q);
  return {q, p, 1 << (rows_log - q - p)};
}
SM90_HD int clipped(int start, int length, int64_t size) {
  return start >= size ? 0 : static_cast<int>(size - start < length ? size - start : length);
}

// What a launch covers: N x P x Q output pixels (of the widest class) cut into tiles, and all blocks of K of one pixel
// tile side by side, so that they share its activations in L2, and next to each other the splits of one sum. Classes
// are the parities of a strided dgrad, the one with most taps first.
struct Extent {
  int Q = 0, P = 0, N = 0;
};
struct Schedule {
  PixelTile tile;
  int k_blocks = 1, q_tiles = 1, p_tiles = 1, n_tiles = 1, classes = 1, splits = 1;
};
struct Job {
  int k_block = 0, parity = 0;  // parity: bit 1 of rows, bit 0 of columns
  Pixel origin;
  int pixel_tile = 0;  // over all classes, in the order of the schedule
  int split = 0;
};
SM90_HD int pixel_tiles(const Schedule& s) {
  return s.q_tiles * s.p_tiles * s.n_tiles * s.classes;
}
SM90_HD int jobs_of(const Schedule& s) {
  return s.splits * s.k_blocks * pixel_tiles(s);
}
SM90_HD Job job_of(const Schedule& s, int job) {
  const int block = job / s.splits, t = block / s.k_blocks, per_class = s.q_tiles * s.p_tiles * s.n_tiles,
            i = t % per_class;
  return {block % s.k_blocks,
          s.classes - 1 - t / per_class,
          {i % s.q_tiles << s.tile.q_log, i / s.q_tiles % s.p_tiles << s.tile.p_log,
           i / (s.q_tiles * s.p_tiles) * s.tile.n},
          t,
          job % s.splits};
}
SM90_HD Schedule schedule_of(PixelTile t, Extent e, int k_blocks, int classes) {
  return {t,
          k_blocks,
          static_cast<int>(ceil_div(e.Q, width_of(t))),
          static_cast<int>(ceil_div(e.P, height_of(t))),
          static_cast<int>(ceil_div(e.N, t.n)),
          classes,
          1};
}
// The cut of 2^rows_log pixels with least tiles; among equals the widest, then the highest. Rows of 16 pixels at most:
// the 16 rows of a warp then start in the image if any of them lies there.
SM90_HD PixelTile best_tile(int rows_log, Extent e) {
  PixelTile best;
  int64_t fewest = -1;
  for (int q = 4; q >= 0; --q) {
    for (int p = least(4, rows_log - q); p >= 0; --p) {
      const PixelTile t{q, p, 1 << (rows_log - q - p)};
      const int64_t tiles = ceil_div(e.Q, width_of(t)) * ceil_div(e.P, height_of(t)) * ceil_div(e.N, t.n);
      if (fewest < 0 || tiles < fewest) {
        best = t;
        fewest = tiles;
      }
    }
  }
  return best;
}
// Pixels of rows [row, row + 2^rows_log) that lie in the image; the run is aligned to its length.
SM90_HD int valid_rows(PixelTile t, Pixel origin, Extent e, int row, int rows_log) {
  const Pixel o = pixel_of_row(t, row);
  const PixelTile s = sub_tile(t, rows_log);
  return clipped(origin.q + o.q, width_of(s), e.Q) * clipped(origin.p + o.p, height_of(s), e.P) *
         clipped(origin.n + o.n, s.n, e.N);
}
SM90_HD bool row_is_valid(PixelTile t, Pixel origin, Extent e, int row) {
  const Pixel o = pixel_of_row(t, row);
  return origin.q + o.q < e.Q && origin.p + o.p < e.P && origin.n + o.n < e.N;
}
// Output rows of one parity class: h = step * index + parity.
SM90_HD int class_size(int64_t size, int step, int parity) {
  return static_cast<int>((size - parity + step - 1) / step);
}

// The taps along one image axis: tap number i is filter position first + i * tap_step and reads the source at
// in_stride * output index + offset + i * offset_step.
struct Axis {
  int first = 0, tap_step = 1, count = 1, offset = 0, offset_step = 1;
};
SM90_HD Axis fprop_axis(int taps, int pad_low) {
  return {0, 1, taps, -pad_low, 1};
}
// dx[step * a + parity] += dy[a + (parity + pad_low - r) / step] * w[r] over the r for which the division is exact.
SM90_HD Axis dgrad_axis(int taps, int pad_low, int step, int parity) {
  const int first = (parity + pad_low) % step;
  return {first, step, first < taps ? (taps - first + step - 1) / step : 0, (parity + pad_low - first) / step, -1};
}
SM90_HD int tap_of(const Axis& a, int i) {
  return a.first + i * a.tap_step;
}
SM90_HD int offset_of(const Axis& a, int i) {
  return a.offset + i * a.offset_step;
}
// One fetch for all taps of an axis: where it starts, and how far tap i lies from there.
SM90_HD int lowest_offset(const Axis& a) {
  return a.offset + (a.offset_step < 0 ? (a.count - 1) * a.offset_step : 0);
}
SM90_HD int shift_of(const Axis& a, int i) {
  return offset_of(a, i) - lowest_offset(a);
}

// The reduction: for a source, chunk slowest, then s, then r.
SM90_HD int chunks_of(int64_t channels, int size = kChunk) {
  return static_cast<int>(ceil_div(channels, size));
}
// Products of 32 bytes of a chunk of `size` channels: 16 channels, or 32 in 8 bits, of which the last half may be
// zeros.
SM90_HD int k16_steps(int64_t channels, int chunk, int size = kChunk) {
  return static_cast<int>(ceil_div(least(size, static_cast<int>(channels) - chunk * size), size / 4));
}

// A split reduction: unit u of `units` (a chunk at one filter column; a chunk of the shortcut) belongs to one split.
SM90_HD int split_begin(int units, int splits, int split) {
  return units * split / splits;
}
// As many splits as fill the multiprocessors once.
SM90_HD int conv_splits(int units, int jobs, int multiprocessors) {
  return most(1, least(units, multiprocessors / jobs));
}
// Where thread t of a consumer leaves accumulator i of a split.
SM90_HD int64_t partial_offset(int block_k, int splits, int block, int consumer, int split, int i, int t) {
  return (((static_cast<int64_t>(block) * kConsumers + consumer) * splits + split) * (block_k / 2) + i) * kWarpgroup +
         t;
}

// Filters, packed: blocks [k_block][chunk][s][r] of block_k rows x 128 bytes, swizzled.
SM90_HD int block_k_of(int64_t K) {
  return K % 160 == 0   ? 160
         : K % 128 == 0 ? 128
         : K % 96 == 0  ? 96
         : K % 80 == 0  ? 80
         : K % 64 == 0  ? 64
         : K % 48 == 0  ? 48
         : K % 32 == 0  ? 32
                        : 16;
}
SM90_HD int64_t packed_block(int chunks, int R, int S, int k_block, int chunk, int s, int r) {
  return ((static_cast<int64_t>(k_block) * chunks + chunk) * S + s) * R + r;
}
SM90_HD int64_t packed_offset(int64_t K, int64_t C, int R, int S, int64_t k, int r, int s, int64_t c,
                              int size = kChunk) {
  const int block_k = block_k_of(K);
  const int64_t block =
      packed_block(chunks_of(C, size), R, S, static_cast<int>(k / block_k), static_cast<int>(c / size), s, r);
  const uint32_t inside =
      static_cast<uint32_t>(k % block_k) * kRowBytes + static_cast<uint32_t>(c % size) * (kRowBytes / size);
  return block * block_k * kRowBytes + swizzled(inside, Swizzle::b128);
}

// Activations in shared memory: [n][p + halo][q] pixels of 128 bytes, as one TMA box leaves them.
SM90_HD int fetched_rows(PixelTile t, int halo) {
  return t.n * (height_of(t) + halo) << t.q_log;
}
// Byte where 64 rows begin, `shift` image rows below the start of the fetch.
SM90_HD uint32_t a_start(PixelTile t, int halo, int row, int shift) {
  const Pixel o = pixel_of_row(t, row);
  return static_cast<uint32_t>((((o.n * (height_of(t) + halo) + o.p + shift) << t.q_log) + o.q) * kRowBytes);
}
// Where fetched row i was read, from the start of the fetch. The division by image rows is a multiplication: exact for
// the at most 320 rows of a fetch.
SM90_HD Pixel fetched_pixel(PixelTile t, int halo, int row, int in_stride) {
  const int height = height_of(t) + halo, line = row >> t.q_log, n = line * (65536 / height + 1) >> 16;
  return {(row & (width_of(t) - 1)) * in_stride, (line - n * height) * in_stride, n};
}
// The 16 bytes of channels 8 * group.. of fetched row i, from the buffer's start.
SM90_HD uint32_t a_vector(int row, int group) {
  return swizzled(static_cast<uint32_t>(row * kRowBytes + group * 16), Swizzle::b128);
}
SM90_HD bool inside(Pixel at, Extent e) {
  return at.q >= 0 && at.q < e.Q && at.p >= 0 && at.p < e.P && at.n >= 0 && at.n < e.N;
}

// Staging of 64 output rows: planes of 32 (else 16) channels, each 64 swizzled rows, as one rank-5 TMA box stores them.
SM90_HD int plane_channels(int block_k) {
  return block_k % 32 == 0 ? 32 : 16;
}
SM90_HD Swizzle plane_swizzle(int block_k) {
  return block_k % 32 == 0 ? Swizzle::b64 : Swizzle::b32;
}
SM90_HD int staging_bytes(int block_k) {
  return 64 * block_k * 2;
}
SM90_HD uint32_t staging_offset(int block_k, int row, int channel) {
  const int width = plane_channels(block_k);
  return static_cast<uint32_t>(channel / width * 64 * width * 2) +
         swizzled(static_cast<uint32_t>(row * width * 2 + channel % width * 2), plane_swizzle(block_k));
}
// stmatrix.x4 over 16 columns from 16 * pair: lane's row address.
SM90_HD uint32_t stmatrix_offset(int block_k, int warp, int lane, int pair) {
  return staging_offset(block_k, 16 * warp + (lane & 15), 16 * pair + 8 * (lane >> 4));
}

// A warp's two sums of a column, in the 16 staging rows of that warp and the plane of that column.
SM90_HD uint32_t exchange_offset(int block_k, int warp, int which, int column) {
  const int width = plane_channels(block_k);
  return static_cast<uint32_t>((column / width * 64 + warp * 16) * width * 2 + (which * width + column % width) * 4);
}
// Row of the partial sums: 64 pixels each.
SM90_HD int64_t part_of(int pixel_tile, int blocks, int block) {
  return static_cast<int64_t>(pixel_tile) * kConsumers * blocks + block;
}

// Dropout counts the elements of y [N,P,Q,K] in memory order.
SM90_HD int64_t element_number(Extent e, int64_t K, Pixel at, int k) {
  return ((static_cast<int64_t>(at.n) * e.P + at.p) * e.Q + at.q) * K + k;
}
// The mask of a tile in shared memory: a row has a word for each 32 channels, bit c % 32 is channel c.
SM90_HD int mask_words(int block_k) {
  return (block_k + 31) / 32;
}
SM90_HD uint32_t mask_offset(int block_k, int row, int channel) {
  return static_cast<uint32_t>((row * mask_words(block_k) + channel / 32) * 4);
}

// A ring of buffers: parity of the phase that its user is in.
struct Ring {
  int index = 0;
  uint32_t phase = 0;
};
SM90_HD Ring next(Ring r, int size) {
  return r.index + 1 == size ? Ring{0, r.phase ^ 1} : Ring{r.index + 1, r.phase};
}

// Shared memory of one convolution kernel. blocks: 64-row blocks a consumer warpgroup; row_taps: filter rows served by
// one fetch (1 or 3).
template <int block_k, int blocks, int row_taps>
struct ConvMemory {
  static constexpr int kRows = kConsumers * blocks * 64;
  static constexpr int kHalo = row_taps - 1;
  // 8x8 images have the most rows of halo a pixel: 4 images x 10 rows x 8.
  static constexpr int kABytes = (kRows + (row_taps > 1 ? kRows / 4 : 0)) * kRowBytes;
  static constexpr int kBBytes = block_k * kRowBytes;
  static constexpr int kStaging = staging_bytes(block_k);
  static constexpr int kBarrierBytes = 512;
  static constexpr int kMaskBytes = kRows * mask_words(block_k) * 4;
  static constexpr int kFree = kSharedMax - kConsumers * kStaging - kBarrierBytes - kMaskBytes;
  static constexpr int kAStages = row_taps > 1 ? 2 : least(8, kFree / (kABytes + kBBytes));
  static constexpr int kBStages = row_taps > 1 ? least(8, (kFree - kAStages * kABytes) / kBBytes) : kAStages;

  static SM90_HD uint32_t a(int stage) { return static_cast<uint32_t>(stage * kABytes); }
  static SM90_HD uint32_t b(int stage) { return static_cast<uint32_t>(kAStages * kABytes + stage * kBBytes); }
  static SM90_HD uint32_t staging(int consumer) { return b(kBStages) + static_cast<uint32_t>(consumer * kStaging); }
  static SM90_HD uint32_t barrier(int i) { return staging(kConsumers) + static_cast<uint32_t>(i * 8); }
  static SM90_HD uint32_t mask() { return barrier(0) + kBarrierBytes; }
  // Barriers, in this order.
  static constexpr int kAFull = 0, kAEmpty = kAFull + kAStages, kARaw = kAEmpty + kAStages, kBFull = kARaw + kAStages,
                       kBEmpty = kBFull + kBStages, kSideFull = kBEmpty + kBStages, kMaskFull = kSideFull + kConsumers,
                       kMaskEmpty = kMaskFull + 1, kBarriers = kMaskEmpty + 1;
  static constexpr uint32_t kBytes =
      kAStages * kABytes + kBStages * kBBytes + kConsumers * kStaging + kBarrierBytes + kMaskBytes;

  static_assert(kBarriers * 8 <= kBarrierBytes && kBytes <= kSharedMax && kAStages >= 2 && kBStages >= 3);
  static_assert(kABytes % 1024 == 0 && kBBytes % 1024 == 0 && kStaging % 1024 == 0);
};

}  // namespace sm90
}  // namespace wrn_fast
