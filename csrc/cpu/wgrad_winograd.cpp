// Winograd wgrad: chunks of tiles, scratch, loops.
//
// Tiles come in chunks. All threads transform the dy of a chunk into D (shared, L3); then they take items, a panel of C
// by a range of K: transform x of the panel into V (the thread's own, L2), multiply with the D of the range, add the
// taps to dw. One item writes an element of dw and chunks follow one another, so threads never change a bit.
#include <omp.h>

#include "wgrad.h"
#include "winograd.h"

namespace wrn_fast {
namespace WRN_ISA {
namespace {

// V of a panel: 36 * 128 * 32 floats are 590 KB of the 1 MB L2 (Zen 4). 96 and 64 tiles are 2-15 % slower: the taps are
// made once a chunk. More of D at once is slower where others use the L3 too (12 MB against 3 MB at 160@32: 10 %).
constexpr int64_t kChunkTiles = 128;
// Plane strides off the powers of two, see winograd.cpp.
constexpr int64_t kPlanePad = 16;

// A strip is a row of tiles of an image. Chunks are whole strips, cut evenly, by shape alone.
struct Tiles {
  int64_t rows, cols;  // of an image
  int64_t strips, chunks, chunk_strips;

  explicit Tiles(const ConvShape& s) {
    rows = (s.P + 3) / 4;
    cols = (s.Q + 3) / 4;
    strips = s.N * rows;
    const int64_t most = cols < kChunkTiles ? kChunkTiles / cols : 1;
    chunks = (strips + most - 1) / most;
    chunk_strips = (strips + chunks - 1) / chunks;
  }
};

struct Buffers {
  PaddedAffine affine;
  float *d, *v, *products, *input;
  int64_t d_plane, d_panel, v_plane, v_floats, products_plane, products_floats, input_floats;
};

Buffers lay_out(Parts& parts, const WinogradInput& in, const Tiles& tiles, const WgradItems& items, int64_t threads) {
  Buffers b = {};
  b.affine = reserve_affine(parts, in.prologue, round_up(in.C, VL));
  b.d_plane = tiles.chunk_strips * tiles.cols * VL + kPlanePad;
  b.d_panel = kWgradMatrices * b.d_plane;
  b.v_plane = tiles.chunk_strips * tiles.cols * NR + kPlanePad;
  b.v_floats = kWgradMatrices * b.v_plane;
  b.products_plane = VL * NR + kPlanePad;
  b.products_floats = kWgradMatrices * b.products_plane;
  b.input_floats = round_up(input_scratch_floats(Algo::f4, in), 16);
  b.d = parts.floats(items.vectors * b.d_panel);
  b.v = parts.floats(threads * b.v_floats);
  b.products = parts.floats(threads * b.products_floats);
  b.input = parts.floats(threads * b.input_floats);
  return b;
}

struct Worker {
  const WgradArgs& args;
  const Tiles& tiles;
  const WgradItems& items;
  const Buffers& buffers;
  InputTransform transform;
  WinogradInput in;
  float *v, *products, *input;

  // Strips [begin, end): a chunk, whose dy is in D.
  void item(int64_t i, int64_t begin, int64_t end) {
    const ConvShape& s = args.shape;
    const int64_t panel = items.panel(i), c0 = panel * NR;
    const int nv = panel_vectors(s.C, panel);
    in.padded = nv * VL;
    // The transform adds the channel to its output pointer, and the panel starts at c0.
    float* out = v - c0;
    for (int64_t strip = begin; strip < end; ++strip, out += tiles.cols * in.padded)
      transform(in, strip / tiles.rows, strip % tiles.rows, c0, c0 + in.padded, out, buffers.v_plane, input);
    WgradOutput output = {};
    output.products = products;
    output.products_plane = buffers.products_plane;
    output.dw = args.dw;
    output.C = s.C;
    output.c0 = c0;
    output.c_count = static_cast<int>(s.C - c0 < in.padded ? s.C - c0 : in.padded);
    output.add = begin > 0;
    output.stream = tiles.chunks == 1;
    // Sums are cut every kCut tiles as in gemm.h: without, the error at 8 x 160@32 (512 tiles) is 1.6e-6, with it 5e-7.
    const WgradWalk walk = {(end - begin) * tiles.cols, kCut, 1, in.padded, kCut * in.padded};
    for (int64_t k = items.begin(i); k < items.end(i); ++k) {
      const float* d = buffers.d + k * buffers.d_panel;
      for (int xi = 0; xi < kWgradMatrices; ++xi)
        wgrad_product(nv, d + xi * buffers.d_plane, v + xi * buffers.v_plane, walk,
                      products + xi * buffers.products_plane);
      output.k0 = k * VL;
      output.k_count = static_cast<int>(s.K - k * VL < VL ? s.K - k * VL : VL);
      wgrad_output(nv, output);
    }
    if (output.stream) stream_fence();
  }
};

}  // namespace

void winograd_wgrad(const WgradArgs& args) {
  const ConvShape& s = args.shape;
  const Tiles tiles(s);
  const WgradItems items(s, args.threads);
  WinogradInput in = {};
  in.data = args.x;
  in.dtype = args.dtype;
  in.N = s.N;
  in.H = s.H;
  in.W = s.W;
  in.C = s.C;
  in.pad_top = s.pad_top;
  in.pad_left = s.pad_left;
  in.prologue = args.prologue;
  in.tile_cols = tiles.cols;
  const GradientInput gradient = {args.dy, args.dtype, s.P, s.Q, s.K, tiles.rows, tiles.cols};

  Parts sizes;
  lay_out(sizes, in, tiles, items, args.threads);
  Parts parts;
  parts.base = static_cast<char*>(scratch_block(sizes.used));
  const Buffers b = lay_out(parts, in, tiles, items, args.threads);
  in.affine = b.affine;
  fill_affine(b.affine, in.prologue, in.C, round_up(in.C, VL));
  const InputTransform transform = input_transform(Algo::f4, in);

#pragma omp parallel num_threads(args.threads)
  {
    const int64_t id = omp_get_thread_num();
    Worker worker = {args,
                     tiles,
                     items,
                     b,
                     transform,
                     in,
                     b.v + id * b.v_floats,
                     b.products + id * b.products_floats,
                     b.input + id * b.input_floats};
    for (int64_t begin = 0; begin < tiles.strips; begin += tiles.chunk_strips) {
      const int64_t end = begin + tiles.chunk_strips < tiles.strips ? begin + tiles.chunk_strips : tiles.strips;
#pragma omp for schedule(dynamic, 1)
      for (int64_t strip = begin; strip < end; ++strip)
        gradient_transform(gradient, strip / tiles.rows, strip % tiles.rows, b.d + (strip - begin) * tiles.cols * VL,
                           b.d_panel, b.d_plane);
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < items.count; ++i) worker.item(i, begin, end);
    }
  }
}

}  // namespace WRN_ISA
}  // namespace wrn_fast
