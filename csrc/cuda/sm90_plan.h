// From a call to what its kernel is given: tensor maps as plain numbers, taps, schedule. Host code, no CUDA.
//
// The launcher encodes the maps for the driver; the host-run tool of tests/cuda reads the same numbers.
#pragma once

#include <cstring>

#include "sm90.h"
#include "sm90_index.h"
#include "sm90_wgrad_index.h"

namespace wrn_fast {
namespace sm90 {

// A tiled tensor map: dimension 0 is contiguous; strides[i] are the bytes of dimension i + 1. The driver takes any
// strides that are multiples of 16: ThunderKittens' maps too have a plane stride that is smaller than a row's.
struct MapSpec {
  const void* base = nullptr;
  int rank = 0;
  uint64_t dims[5] = {1, 1, 1, 1, 1};
  uint64_t strides[4] = {0, 0, 0, 0};
  uint32_t box[5] = {1, 1, 1, 1, 1};
  uint32_t steps[5] = {1, 1, 1, 1, 1};  // element strides
  Swizzle swizzle = Swizzle::none;
  int element = 2;  // bytes
};

// One source of the reduction.
struct Source {
  int channels = 0;  // 0: absent
  int in_stride = 1;
  Extent extent;                       // of the source's images
  Axis rows[2] = {}, columns[2] = {};  // by parity
  const float* scale = nullptr;        // of the prologue; null: none
  const float* shift = nullptr;
  Act act = Act::identity;
  float slope = 0.f;
};

// The epilogue's second operand ("side") is the residual of fprop and x of dgrad.
struct ConvScalars {
  const void* w = nullptr;
  const void* w_short = nullptr;
  Source source, source_short;
  int R = 1, S = 1;
  Schedule schedule;
  Extent out[4];  // by parity
  bool has_side = false, has_y = false, has_act = false, prologue = false;

  const float* bias = nullptr;
  const float* scale = nullptr;  // of y_act (fprop), of v (dgrad); null: 1
  const float* shift = nullptr;  // null: 0
  Act act = Act::identity;       // act_out (fprop), act (dgrad)
  float slope = 0.f;
  const float* mean = nullptr;
  const float* rstd = nullptr;
  float* counts = nullptr;
  float* sums = nullptr;  // moments (fprop), sums (dgrad)
  float* partials = nullptr;
  int* counters = nullptr;

  // Dropout of y or of y_act.
  bool drop_y = false, drop_act = false;
  const int64_t* rng = nullptr;
  uint32_t threshold = 0;
  float kept = 1.f;  // what an element that stays is multiplied by

  // Operands in e4m3: what makes the sums of either source numbers, [K].
  const float* factor = nullptr;
  const float* factor_short = nullptr;
};
template <class Map>
struct ConvParams : ConvScalars {
  Map a, a_short;
  Map side[4], y[4];  // by parity
  Map y_act;
};

// Which compiled kernel: pixels and reuse of a fetch by Sm90Tile.
inline int blocks_of(Sm90Tile t) {
  return t == Sm90Tile::shift3 ? 2 : 1;
}
inline int row_taps_of(Sm90Tile t) {
  return t == Sm90Tile::shift3 ? 3 : 1;
}

// shift3 reads 64 rows at a time as one run of the fetched pixels, so 64 rows may not cross images.
inline PixelTile tile_of(Sm90Tile t, Extent e) {
  if (t == Sm90Tile::fetch9) return best_tile(blocks_of(t) == 1 ? 7 : 8, e);
  const PixelTile whole{4, 4, 1}, four{3, 3, 4};
  return jobs_of(schedule_of(whole, e, 1, 1)) <= jobs_of(schedule_of(four, e, 1, 1)) ? whole : four;
}

// The compiled kernels: X(block_k, Sm90Tile, 64-row blocks a warpgroup, filter rows a fetch serves).
#define SM90_FETCH9(X) \
  X(16, fetch9, 1, 1)  \
  X(32, fetch9, 1, 1)  \
  X(48, fetch9, 1, 1)  \
  X(64, fetch9, 1, 1) X(80, fetch9, 1, 1) X(96, fetch9, 1, 1) X(128, fetch9, 1, 1) X(160, fetch9, 1, 1)
#define SM90_SHIFT3(X) X(64, shift3, 2, 3) X(128, shift3, 2, 3) X(160, shift3, 2, 3)

// Dynamic shared memory of a kernel; 0: not compiled.
inline uint32_t shared_bytes_of(int block_k, Sm90Tile tile) {
#define CASE(k, t, blocks, taps) \
  if (block_k == k && tile == Sm90Tile::t) return ConvMemory<k, blocks, taps>::kBytes;
  SM90_FETCH9(CASE)
  SM90_SHIFT3(CASE)
#undef CASE
  return 0;
}

inline int64_t packed_bytes(int64_t K, int64_t C, int R, int S, bool e4m3 = false) {
  return K * R * S * chunks_of(C, e4m3 ? kChunk8 : kChunk) * kRowBytes;
}

inline Extent extent_of(int64_t W, int64_t H, int64_t N) {
  return {static_cast<int>(W), static_cast<int>(H), static_cast<int>(N)};
}

// The pixels that a pass writes, those of the widest parity.
inline Extent written(const ConvShape& s, bool dgrad) {
  return dgrad ? extent_of(class_size(s.W, s.stride, 0), class_size(s.H, s.stride, 0), s.N) : extent_of(s.Q, s.P, s.N);
}
inline Schedule schedule_for(const ConvShape& s, bool dgrad, Sm90Tile tile) {
  const Extent e = written(s, dgrad);
  const int64_t channels = dgrad ? s.C : s.K;
  return schedule_of(tile_of(tile, e), e, static_cast<int>(channels / block_k_of(channels)),
                     dgrad ? s.stride * s.stride : 1);
}
inline int64_t parts_of(const ConvShape& s, bool dgrad, Sm90Tile tile) {
  return static_cast<int64_t>(pixel_tiles(schedule_for(s, dgrad, tile))) * kConsumers * blocks_of(tile);
}

// Splits of the reduction of a small call: fetch9 alone has them. short_C: channels of the shortcut, 0 without.
inline int splits_of(const ConvShape& s, int64_t short_C, bool dgrad, int multiprocessors, bool e4m3 = false) {
  const int size = e4m3 ? kChunk8 : kChunk, chunks = chunks_of(dgrad ? s.K : s.C, size);
  // A strided dgrad is not cut: its parities differ in units.
  const int units = dgrad && s.stride > 1 ? 1 : chunks * s.S + chunks_of(short_C, size);
  return conv_splits(units, jobs_of(schedule_for(s, dgrad, Sm90Tile::fetch9)), multiprocessors);
}
inline int64_t split_blocks(const ConvShape& s, bool dgrad) {
  return static_cast<int64_t>(jobs_of(schedule_for(s, dgrad, Sm90Tile::fetch9))) * kConsumers;
}
inline int64_t partial_bytes(const ConvShape& s, bool dgrad, int splits) {
  return splits > 1 ? split_blocks(s, dgrad) * splits * (block_k_of(dgrad ? s.C : s.K) / 2) * kWarpgroup * 4 : 0;
}
inline bool refuses_launch(const Sm90Launch& l, Sm90Tile tile) {
  return l.splits < 1 || (l.splits > 1 && (tile != Sm90Tile::fetch9 || !l.partials || !l.counters));
}
inline void take_launch(ConvScalars& p, const Sm90Launch& l) {
  p.schedule.splits = l.splits;
  p.partials = l.partials;
  p.counters = l.counters;
}

// Why fprop, in 16 bits or ("fprop_fp8") in 8, or dgrad cannot be served, or null.
inline const char* refuses(const char* op, const ConvShape& s, DType dtype, Sm90Tile tile) {
  const bool dgrad = std::strcmp(op, "dgrad") == 0;
  if (dtype != DType::bf16 && dtype != DType::f16) return "needs bfloat16 or float16";
  if (s.C % 16 || s.K % 16) return "needs C and K to be multiples of 16";
  if (s.stride < 1 || s.stride > 2) return "needs stride 1 or 2";
  if (s.R > 7 || s.S > 7) return "needs a filter of at most 7x7";
  if (dgrad && (s.H < s.stride || s.W < s.stride)) return "needs an image of at least stride x stride";
  if (s.N > 1 << 24 || s.H > 1 << 14 || s.W > 1 << 14 || s.P > 1 << 14 || s.Q > 1 << 14) return "needs smaller images";
  if (static_cast<double>(pixel_tiles(schedule_for(s, dgrad, tile))) * 64 > 1 << 30) return "needs fewer pixels";
  if (tile == Sm90Tile::shift3) {
    if (!shared_bytes_of(block_k_of(dgrad ? s.C : s.K), tile)) return "shift3 needs K in blocks of 64, 128 or 160";
    if (s.R != 3 || s.S != 3 || s.stride != 1) return "shift3 needs a 3x3 filter at stride 1";
  }
  return nullptr;
}

// x [N,H,W,C]: boxes of a chunk of channels x the tile's pixels, every `step`-th of them, with `halo` more rows.
inline MapSpec source_map(const void* x, int64_t N, int64_t H, int64_t W, int64_t C, PixelTile t, int halo, int step,
                          bool e4m3 = false) {
  const int size = e4m3 ? kChunk8 : kChunk, bytes = kRowBytes / size;
  MapSpec m;
  m.base = x;
  m.rank = 4;
  const uint64_t dims[4] = {uint64_t(C), uint64_t(W), uint64_t(H), uint64_t(N)};
  const uint32_t box[4] = {uint32_t(size), uint32_t(width_of(t) * step), uint32_t((height_of(t) + halo) * step),
                           uint32_t(t.n)};
  const uint32_t steps[4] = {1, uint32_t(step), uint32_t(step), 1};
  for (int i = 0; i < 4; ++i) {
    m.dims[i] = dims[i];
    m.box[i] = box[i];
    m.steps[i] = steps[i];
  }
  m.strides[0] = C * bytes;
  m.strides[1] = W * C * bytes;
  m.strides[2] = H * W * C * bytes;
  m.swizzle = Swizzle::b128;
  m.element = bytes;
  return m;
}

// The pixels of one parity of y [N,H,W,C], 2^rows_log rows of the tile x block_k channels a box: channels of a plane,
// W, H, N, planes.
inline MapSpec output_map(const void* y, int64_t N, int64_t H, int64_t W, int64_t C, PixelTile tile, int step,
                          int parity, int rows_log = 6) {
  const PixelTile t = sub_tile(tile, rows_log);
  const int width = plane_channels(block_k_of(C)), row = parity >> 1, column = parity & 1;
  MapSpec m;
  m.base = static_cast<const char*>(y) + (row * W + column) * C * 2;
  m.rank = 5;
  m.dims[0] = width;
  m.dims[1] = class_size(W, step, column);
  m.dims[2] = class_size(H, step, row);
  m.dims[3] = N;
  m.dims[4] = C / width;
  m.strides[0] = step * C * 2;
  m.strides[1] = step * W * C * 2;
  m.strides[2] = H * W * C * 2;
  m.strides[3] = width * 2;
  m.box[0] = width;
  m.box[1] = width_of(t);
  m.box[2] = height_of(t);
  m.box[3] = t.n;
  m.box[4] = block_k_of(C) / width;
  m.swizzle = plane_swizzle(block_k_of(C));
  return m;
}

inline void take_prologue(Source& s, const Sm90Prologue& p) {
  s.scale = p.scale;
  s.shift = p.shift;
  s.act = p.act;
  s.slope = p.slope;
}

inline ConvParams<MapSpec> fprop_params(const Sm90Fprop& f) {
  const ConvShape& s = f.shape;
  ConvParams<MapSpec> p;
  p.schedule = schedule_for(s, false, f.tile);
  take_launch(p, f);
  const PixelTile t = p.schedule.tile;
  p.out[0] = written(s, false);
  p.R = s.R;
  p.S = s.S;
  p.w = f.w;
  p.source.channels = static_cast<int>(s.C);
  p.source.in_stride = s.stride;
  p.source.extent = extent_of(s.W, s.H, s.N);
  p.source.rows[0] = fprop_axis(s.R, s.pad_top);
  p.source.columns[0] = fprop_axis(s.S, s.pad_left);
  take_prologue(p.source, f.prologue);
  p.a = source_map(f.x, s.N, s.H, s.W, s.C, t, row_taps_of(f.tile) - 1, s.stride, f.factor);
  if (f.x_short) {
    p.w_short = f.w_short;
    p.source_short.channels = static_cast<int>(f.short_C);
    p.source_short.in_stride = f.short_stride;
    p.source_short.extent = extent_of(f.short_W, f.short_H, s.N);
    take_prologue(p.source_short, f.short_prologue);
    p.a_short = source_map(f.x_short, s.N, f.short_H, f.short_W, f.short_C, t, 0, f.short_stride, f.factor);
  }
  p.prologue = p.source.scale || p.source_short.scale;
  p.has_side = f.residual;
  p.has_y = f.y;
  p.has_act = f.y_act;
  if (f.residual) p.side[0] = output_map(f.residual, s.N, s.P, s.Q, s.K, t, 1, 0);
  if (f.y) p.y[0] = output_map(f.y, s.N, s.P, s.Q, s.K, t, 1, 0);
  if (f.y_act) p.y_act = output_map(f.y_act, s.N, s.P, s.Q, s.K, t, 1, 0);
  p.bias = f.bias;
  p.scale = f.out_scale;
  p.shift = f.out_shift;
  p.act = f.act_out;
  p.slope = f.slope_out;
  p.drop_y = f.mask.rng && !f.drop_act;
  p.drop_act = f.mask.rng && f.drop_act;
  p.rng = f.mask.rng;
  p.threshold = f.mask.threshold;
  p.kept = static_cast<float>(f.mask.scale);
  p.counts = f.counts;
  p.sums = f.moments;
  p.factor = f.factor;
  p.factor_short = f.factor_short;
  return p;
}

// dgrad is a convolution of dy with C and K exchanged; at stride 2 one dense convolution for each parity of (h, w).
inline ConvParams<MapSpec> dgrad_params(const Sm90Dgrad& d) {
  const ConvShape& s = d.shape;
  ConvParams<MapSpec> p;
  p.schedule = schedule_for(s, true, d.tile);
  take_launch(p, d);
  const PixelTile t = p.schedule.tile;
  p.R = s.R;
  p.S = s.S;
  p.w = d.w;
  p.source.channels = static_cast<int>(s.K);
  p.source.extent = extent_of(s.Q, s.P, s.N);
  p.a = source_map(d.dy, s.N, s.P, s.Q, s.K, t, row_taps_of(d.tile) - 1, 1);
  for (int parity = 0; parity < s.stride; ++parity) {
    p.source.rows[parity] = dgrad_axis(s.R, s.pad_top, s.stride, parity);
    p.source.columns[parity] = dgrad_axis(s.S, s.pad_left, s.stride, parity);
  }
  p.has_side = d.x;
  p.has_y = true;
  for (int c = 0; c < p.schedule.classes; ++c) {
    p.out[c] = extent_of(class_size(s.W, s.stride, c & 1), class_size(s.H, s.stride, c >> 1), s.N);
    if (d.x) p.side[c] = output_map(d.x, s.N, s.H, s.W, s.C, t, s.stride, c);
    p.y[c] = output_map(d.g, s.N, s.H, s.W, s.C, t, s.stride, c);
  }
  p.scale = d.prologue.scale;
  p.shift = d.prologue.shift;
  p.act = d.prologue.act;
  p.slope = d.prologue.slope;
  p.mean = d.mean;
  p.rstd = d.rstd;
  p.sums = d.sums;
  return p;
}

inline uint32_t wgrad_shared_bytes(int block_k, bool halo) {
#define CASE(k, tile, blocks, taps) \
  if (block_k == k) return halo ? WgradMemory<k, true>::kBytes : WgradMemory<k, false>::kBytes;
  SM90_FETCH9(CASE)
#undef CASE
  return 0;
}

struct WgradScalars {
  WgradGrid grid;
  Schedule schedule;  // of the pixels
  int in_stride = 1, channels = 0, K = 0, pad_left = 0, pad_top = 0;
  float* slabs = nullptr;  // [splits][K][R][S][C]: dw itself where there is one split
};
template <class Map>
struct WgradParams : WgradScalars {
  Map a, dy;
};

// A fetch of three filter rows at once: 3x3 at stride 1, image rows on the swizzle's period, and room for the halo.
inline bool wgrad_halo(const ConvShape& s, PixelTile t) {
  return s.R == 3 && s.stride == 1 && t.q_log >= 3 && fetched_rows(t, 2) <= 160;
}
inline PixelTile wgrad_tile(const ConvShape& s) {
  return best_tile(kWgradRowsLog, extent_of(s.Q, s.P, s.N));
}
inline WgradGrid wgrad_grid(const ConvShape& s, int multiprocessors) {
  WgradGrid g{chunks_of(s.C), s.R, s.S, static_cast<int>(s.K / block_k_of(s.K)), 1};
  g.splits = wgrad_splits(g, pixel_tiles(schedule_of(wgrad_tile(s), extent_of(s.Q, s.P, s.N), 1, 1)), multiprocessors);
  return g;
}
inline int64_t slab_size(const ConvShape& s) {
  return s.K * s.R * s.S * s.C;
}
inline int64_t wgrad_workspace(const ConvShape& s, int multiprocessors) {
  const int splits = wgrad_grid(s, multiprocessors).splits;
  return splits > 1 ? splits * slab_size(s) * 4 : 0;
}

inline WgradParams<MapSpec> wgrad_params(const Sm90Wgrad& w, int multiprocessors) {
  const ConvShape& s = w.shape;
  const PixelTile t = wgrad_tile(s);
  WgradParams<MapSpec> p;
  p.grid = wgrad_grid(s, multiprocessors);
  p.schedule = schedule_of(t, extent_of(s.Q, s.P, s.N), 1, 1);
  p.in_stride = s.stride;
  p.channels = static_cast<int>(s.C);
  p.K = static_cast<int>(s.K);
  p.pad_left = s.pad_left;
  p.pad_top = s.pad_top;
  p.slabs = p.grid.splits > 1 ? w.workspace : w.dw;
  p.a = source_map(w.x, s.N, s.H, s.W, s.C, t, wgrad_halo(s, t) ? 2 : 0, s.stride);
  p.dy = output_map(w.dy, s.N, s.P, s.Q, s.K, t, 1, 0, kWgradRowsLog);
  return p;
}

}  // namespace sm90
}  // namespace wrn_fast
