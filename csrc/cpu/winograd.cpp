// The fused Winograd convolution: plan, scratch and the loops over chunks, panels and strips.
//
// private chunks: each thread takes chunks of about 32 tiles, transforms them into its own V (L2) and runs all panels.
//                 No barrier; the whole U streams from L3 once a chunk.
// shared V:       with too few chunks, all threads transform one V and then share (panel, part) items.
// Neither changes a bit of the result: sums run over channels in one order, statistics over strips in one order.
#include "winograd.h"

#include <omp.h>

#include "shares.h"
#include "winograd_points.h"

namespace wrn_fast {
namespace WRN_ISA {
namespace {

// Measured on Zen 4 (1 MB L2): 32 is best at C = 160 and 640, 32-128 equal at 320.
constexpr int64_t kChunkTiles = 32;
// A U that several chunks may stream at once without regret: where it stays in L3 one chunk a thread is enough, down to
// 16 tiles (160@32, one image, 2 cores: 0.72 ms against 1.05 with a shared V, half of which lies in the other core's
// L2).
constexpr int64_t kStreamBytes = int64_t{8} << 20;
constexpr int64_t kChunkTilesLeast = 16;
// A V larger than this is cut into rounds; it bounds scratch when many threads share a large batch.
constexpr int64_t kSharedBytes = int64_t{32} << 20;
// Plane strides off the powers of two: the planes of V would otherwise fall on the same cache sets.
constexpr int64_t kPlanePad = 16;
// A transformed filter above this does not stay in L2 from one chunk of tiles to the next.
constexpr int64_t kFetchBytes = int64_t{1} << 20;

int matrices_of(Algo algo) {
  return tile_products(algo) * tile_products(algo);
}

// The filter matrix that product x takes: the last two of a dimension share one at stride 2.
int filter_of(Algo algo, int x) {
  if (algo != Algo::f2s2) return x;
  const int i = x / 5, j = x % 5;
  return (i < 3 ? i : 3) * 4 + (j < 3 ? j : 3);
}

struct Plan {
  bool shared;
  int64_t chunk_strips;  // strips whose V is held at once: by a thread, or by all when shared
  int64_t parts;         // shared: parts of a round that are multiplied separately
  int64_t part_strips;   // most strips that one gemm call sees
  int64_t channel_step;  // shared: channels of one input-transform item
};

Plan make_plan(const WinogradCall& call, const Strips& strips, int64_t panels) {
  const WinogradInput& in = call.input;
  const int64_t count = strips.count(), threads = call.threads;
  const auto chunks_of = [&](int64_t tiles) {
    const int64_t strips_each = tiles < in.tile_cols ? 1 : tiles / in.tile_cols;
    return (count + strips_each - 1) / strips_each;
  };
  const bool streams = filter_floats(call.algo, call.filter) * 4 <= kStreamBytes;
  int64_t chunks = chunks_of(kChunkTiles);
  if (streams && chunks < threads) chunks = chunks_of(kChunkTilesLeast);
  if (threads == 1 || chunks >= (streams ? 1 : 2) * threads) {
    chunks = round_up(chunks, threads);
    const int64_t even = (count + chunks - 1) / chunks;
    return {false, even, 1, even, in.padded};
  }
  const int64_t strip_bytes = matrices_of(call.algo) * in.tile_cols * in.padded * 4;
  int64_t round = kSharedBytes / strip_bytes;
  round = round < 1 ? 1 : round > count ? count : round;
  // Enough parts that panels * parts keeps at least 90 % of the threads busy, no more: each part reads U again.
  int64_t parts = 1;
  double best = 0;
  for (int64_t p = 1; p <= round && best < 0.9; ++p) {
    const int64_t items = panels * p, waves = (items + threads - 1) / threads;
    const double busy = static_cast<double>(items) / static_cast<double>(waves * threads);
    if (busy > best + 0.01) best = busy, parts = p;
  }
  const int64_t groups = (2 * threads + round - 1) / round;
  const int64_t step = round_up((in.padded + groups - 1) / groups, VL);
  return {true, round, parts, (round + parts - 1) / parts, step < 4 * VL ? 4 * VL : step};
}

struct Buffers {
  PaddedAffine affine;
  float* packed;
  float *records, *shares;
  float *v, *products, *tile, *input;
  int64_t v_floats, products_floats, tile_floats, input_floats;
};

Buffers lay_out(Parts& parts, const WinogradCall& call, const Plan& plan, const Strips& strips, bool statistics) {
  const WinogradInput& in = call.input;
  const int64_t matrices = matrices_of(call.algo), m = tile_outputs(call.algo), threads = call.threads;
  Buffers b = {};
  b.affine = reserve_affine(parts, in.prologue, in.padded);
  if (!call.packed) b.packed = parts.floats(filter_floats(call.algo, call.filter));
  if (statistics) b.records = parts.floats(records_floats(call.epilogue, strips.count()));
  if (!plan.shared) b.shares = parts.floats(Shares::floats(threads));
  b.v_floats = matrices * (plan.chunk_strips * in.tile_cols * in.padded + kPlanePad);
  b.products_floats = plan.part_strips * in.tile_cols * matrices * NR;
  b.tile_floats = (m * m + RECORD) * NR;
  b.input_floats = round_up(input_scratch_floats(call.algo, in), 16);
  b.v = parts.floats(b.v_floats * (plan.shared ? 1 : threads));
  b.products = parts.floats(b.products_floats * threads);
  b.tile = parts.floats(b.tile_floats * threads);
  b.input = parts.floats(b.input_floats * threads);
  return b;
}

// What one thread needs to turn a part of V into output.
struct Worker {
  const WinogradCall& call;
  const Strips& strips;
  OutputTransform output;
  const float* packed;
  int64_t plane;
  float *products, *tile, *state;

  int64_t pixel(int64_t strip, int64_t t) const {
    const int64_t image = strip / strips.per_image(), row = strip % strips.per_image() * strips.strip_rows;
    return (image * strips.height + row) * strips.width + t * strips.strip_rows;
  }

  // v: tile 0 of strip `begin`.
  void panel(int64_t p, const float* v, int64_t begin, int64_t end) const {
    const WinogradInput& in = call.input;
    const int matrices = matrices_of(call.algo), filters = filter_matrices(call.algo, call.filter);
    const int nv = panel_vectors(call.out_C, p), width = nv * VL;
    const float* u = packed + p * panel_floats(filters, in.C);
    const int64_t tiles = (end - begin) * in.tile_cols;
    const bool far = filters * in.C * call.out_C * 4 > kFetchBytes;
    for (int x = 0; x < matrices; ++x) {
      const Segment segment = {v + x * plane, 0, in.padded, u + filter_of(call.algo, x) * in.C * width, in.C};
      const float* next = nullptr;
      if (far && x + 1 < matrices)
        next = u + filter_of(call.algo, x + 1) * in.C * width;
      else if (far && p + 1 < panel_count(call.out_C))
        next = u + panel_floats(filters, in.C);
      gemm_panel(nv, &segment, 1, tiles, tiles, products + x * width, matrices * width, next);
    }
    for (int64_t s = begin; s < end; ++s)
      finish_strip(p, s, s + 1 < end, products + (s - begin) * in.tile_cols * matrices * width);
  }

  void finish_strip(int64_t p, int64_t strip, bool more, const float* strip_products) const {
    const Epilogue& e = call.epilogue;
    const int m = tile_outputs(call.algo), nv = panel_vectors(call.out_C, p), width = nv * VL;
    const int64_t tiles = call.input.tile_cols, k0 = p * NR;
    const int64_t top = strip % strips.per_image() * m;
    OutTile t = {};
    t.acc = tile;
    t.acc_row = m * width;
    t.acc_col = width;
    t.rows = static_cast<int>(strips.height - top < m ? strips.height - top : m);
    t.pixel_row = strips.width;
    t.pixel_col = 1;
    t.k0 = k0;
    t.kn = static_cast<int>(call.out_C - k0 < width ? call.out_C - k0 : width);
    t.state = state;
    for (int64_t j = 0; j < tiles; ++j) {
      const int64_t ahead = j + 2;
      if (ahead < tiles)
        prefetch_tile(e, pixel(strip, ahead), strips.width, t.rows, m, k0, t.kn);
      else if (more && ahead - tiles < tiles)
        prefetch_tile(e, pixel(strip + 1, ahead - tiles), strips.width, m, m, k0, t.kn);
      output(strip_products + j * matrices_of(call.algo) * width, nv, tile);
      t.cols = static_cast<int>(strips.width - j * m < m ? strips.width - j * m : m);
      t.pixel = pixel(strip, j);
      e.run(e, t);
      t.before += int64_t{t.rows} * t.cols;
    }
    if (e.records) close_strip(e, strip, t, strips.pixels(strip));
  }
};

}  // namespace

void winograd(const WinogradCall& given, float* statistics) {
  WinogradCall call = given;
  WinogradInput& in = call.input;
  const int m = tile_outputs(call.algo);
  in.padded = round_up(in.C, VL);
  in.tile_cols = (call.out_W + m - 1) / m;
  const Strips strips = {in.N, call.out_H, call.out_W, m};
  const int64_t panels = panel_count(call.out_C), count = strips.count();
  const Plan plan = make_plan(call, strips, panels);

  Parts sizes;
  lay_out(sizes, call, plan, strips, statistics);
  Parts parts;
  parts.base = static_cast<char*>(scratch_block(sizes.used));
  const Buffers b = lay_out(parts, call, plan, strips, statistics);

  in.affine = b.affine;
  fill_affine(b.affine, in.prologue, in.C, in.padded);
  set_records(call.epilogue, b.records, strips.count());
  if (b.packed) {
    pack_filter(call.algo, call.filter, b.packed, call.threads);
    call.packed = b.packed;
  }
  const InputTransform input = input_transform(call.algo, in);
  const int64_t per_image = strips.per_image(), strip_floats = in.tile_cols * in.padded;
  const int64_t plane = plan.chunk_strips * strip_floats + kPlanePad;
  const int64_t rounds = (count + plan.chunk_strips - 1) / plan.chunk_strips;
  const Shares shares(b.shares, rounds, plan.shared ? 0 : call.threads);

#pragma omp parallel num_threads(call.threads)
  {
    const int64_t id = omp_get_thread_num();
    float* v = b.v + (plan.shared ? 0 : id * b.v_floats);
    float* scratch = b.input + id * b.input_floats;
    float* tile = b.tile + id * b.tile_floats;
    const Worker worker = {
        call, strips,           output_transform(call.algo), call.packed, plane, b.products + id * b.products_floats,
        tile, tile + m * m * NR};
    if (!plan.shared) {
      for (int64_t r = shares.take(id); r >= 0; r = shares.take(id)) {
        const int64_t begin = r * count / rounds, end = (r + 1) * count / rounds;
        for (int64_t s = begin; s < end; ++s)
          input(in, s / per_image, s % per_image, 0, in.padded, v + (s - begin) * strip_floats, plane, scratch);
        for (int64_t p = 0; p < panels; ++p) worker.panel(p, v, begin, end);
      }
    } else {
      const int64_t groups = (in.padded + plan.channel_step - 1) / plan.channel_step;
      for (int64_t r = 0; r < rounds; ++r) {
        const int64_t begin = r * count / rounds, end = (r + 1) * count / rounds;
#pragma omp for collapse(2) schedule(static)
        for (int64_t s = begin; s < end; ++s)
          for (int64_t g = 0; g < groups; ++g) {
            const int64_t c0 = g * plan.channel_step;
            const int64_t c1 = c0 + plan.channel_step < in.padded ? c0 + plan.channel_step : in.padded;
            input(in, s / per_image, s % per_image, c0, c1, v + (s - begin) * strip_floats, plane, scratch);
          }
#pragma omp for collapse(2) schedule(dynamic, 1)
        for (int64_t p = 0; p < panels; ++p)
          for (int64_t q = 0; q < plan.parts; ++q) {
            const int64_t from = begin + q * (end - begin) / plan.parts,
                          to = begin + (q + 1) * (end - begin) / plan.parts;
            if (from < to) worker.panel(p, v + (from - begin) * strip_floats, from, to);
          }
      }
    }
  }

  if (statistics) merge_records(call.epilogue, statistics, call.threads);
}

}  // namespace WRN_ISA
}  // namespace wrn_fast
