// The direct convolution and its dgrad: plan, scratch and the loops over chunks of output rows and panels.
#include "direct.h"

#include <omp.h>

#include "shares.h"

namespace wrn_fast {
namespace WRN_ISA {
namespace {

// Output pixels of one chunk: enough to pay for reading a panel of weights (L3), few enough for a buffer in L2.
constexpr int64_t kChunkPixels = 128;
constexpr int64_t kSharedBytes = int64_t{32} << 20;
constexpr int kSegmentsMax = kTapsMax + 1;

int64_t floor_div(int64_t a, int64_t b) {
  return a >= 0 ? a / b : -((-a + b - 1) / b);
}

struct Tap {
  int R, S, stride;
  int pad_top, pad_left;
};

struct DirectCall {
  int threads;
  bool transposed;  // dgrad
  int n_sources;
  DirectSource source[2];
  Tap tap[2];
  FilterView filter[2];
  const float* packed[2];
  int64_t N, out_H, out_W, out_C;
  int phases;  // classes of output rows and of output columns: the stride in dgrad, else 1
  Epilogue epilogue;
};

// Source row of buffer row 0 when the chunk begins at output row `begin`.
int64_t first_row(const DirectCall& c, int i, int64_t begin) {
  const Tap& t = c.tap[i];
  if (c.transposed) return floor_div(begin + t.pad_top - t.R + 1, t.stride);
  return begin * t.stride - t.pad_top;
}

void set_geometry(DirectCall& c, int i, int64_t chunk_rows) {
  DirectSource& s = c.source[i];
  const Tap& t = c.tap[i];
  s.padded = round_up(s.C, VL);
  if (c.transposed) {
    s.step = 1;
    s.first_col = floor_div(t.pad_left - t.S + 1, t.stride);
    s.cols = floor_div(c.out_W - 1 + t.pad_left, t.stride) - s.first_col + 1;
    s.rows = (chunk_rows + t.R - 2) / t.stride + 2;
  } else {
    s.step = t.R == 1 && t.S == 1 ? t.stride : 1;
    s.first_col = -t.pad_left;
    s.cols = ((c.out_W - 1) * t.stride + t.S - 1) / s.step + 1;
    s.rows = ((chunk_rows - 1) * t.stride + t.R - 1) / s.step + 1;
  }
}

// The taps that reach output row `row` (chunk beginning at `begin`) in column phase `phase`, and every stride'th row
// and column from there.
int segments(const DirectCall& c, const float* const* buffers, int64_t panel, int width, int64_t begin, int64_t row,
             int phase, Segment* out) {
  int n = 0;
  for (int i = 0; i < c.n_sources; ++i) {
    const DirectSource& s = c.source[i];
    const Tap& t = c.tap[i];
    const float* weights = c.packed[i] + panel * panel_floats(t.R * t.S, s.C);
    const int64_t top = first_row(c, i, begin), step = c.transposed ? 1 : t.stride / s.step;
    for (int r = 0; r < t.R; ++r)
      for (int q = 0; q < t.S; ++q) {
        int64_t from_row, from_col;
        if (c.transposed) {
          const int64_t h = row + t.pad_top - r, w = phase + t.pad_left - q;
          if (h % t.stride || w % t.stride) continue;
          from_row = floor_div(h, t.stride) - top;
          from_col = floor_div(w, t.stride) - s.first_col;
        } else {
          from_row = ((row - begin) * t.stride + r) / s.step;
          from_col = q;
        }
        out[n++] = {buffers[i] + (from_row * s.cols + from_col) * s.padded, step * s.cols * s.padded, step * s.padded,
                    weights + (r * t.S + q) * s.C * width, s.C};
      }
  }
  return n;
}

struct Plan {
  bool shared;
  int64_t chunk_rows, per_image, chunks;
  int64_t held;  // chunks whose buffers exist at once: one a thread, or a round's
};

Plan make_plan(const DirectCall& c) {
  int64_t rows = (kChunkPixels + c.out_W - 1) / c.out_W;
  if (rows > c.out_H) rows = c.out_H;
  const int64_t per_image = (c.out_H + rows - 1) / rows;
  rows = (c.out_H + per_image - 1) / per_image;
  return {false, rows, per_image, c.N * per_image, c.threads};
}

struct Buffers {
  float* packed[2];
  float *records, *shares, *rows, *acc, *multipliers;
  PaddedAffine affine[2];
  int64_t source_floats[2], chunk_floats, acc_floats, multipliers_floats;
};

Buffers lay_out(Parts& parts, const DirectCall& c, const Plan& plan, bool statistics) {
  Buffers b = {};
  for (int i = 0; i < c.n_sources; ++i) {
    const DirectSource& s = c.source[i];
    b.affine[i] = reserve_affine(parts, s.prologue, s.padded);
    if (!c.packed[i]) b.packed[i] = parts.floats(filter_floats(Algo::direct, c.filter[i]));
    b.source_floats[i] = s.rows * s.cols * s.padded;
    b.chunk_floats += b.source_floats[i];
    if (s.prologue.dropout.active && s.W * s.C + VL > b.multipliers_floats) b.multipliers_floats = s.W * s.C + VL;
  }
  if (statistics) b.records = parts.floats(records_floats(c.epilogue, plan.chunks * c.phases * c.phases));
  if (!plan.shared) b.shares = parts.floats(Shares::floats(c.threads));
  b.acc_floats = (plan.chunk_rows * c.out_W + RECORD) * NR;
  b.rows = parts.floats(b.chunk_floats * plan.held);
  b.acc = parts.floats(b.acc_floats * c.threads);
  b.multipliers = parts.floats(round_up(b.multipliers_floats, 16) * c.threads);
  return b;
}

// One panel of output channels for the rows [begin, end) of an image, the chunk'th.
void run_panel(const DirectCall& c, const Buffers& b, const float* buffer, int64_t chunk, int64_t image, int64_t begin,
               int64_t end, int64_t panel, float* acc) {
  const int nv = panel_vectors(c.out_C, panel), width = nv * VL;
  const float* buffers[2] = {buffer, buffer + b.source_floats[0]};
  OutTile t = {};
  t.acc = acc;
  t.acc_col = width;
  t.pixel_row = c.phases * c.out_W;
  t.pixel_col = c.phases;
  t.k0 = panel * NR;
  t.kn = static_cast<int>(c.out_C - t.k0 < width ? c.out_C - t.k0 : width);
  t.state = acc + b.acc_floats - RECORD * NR;
  prefetch_tile(c.epilogue, (image * c.out_H + begin) * c.out_W, c.out_W, static_cast<int>(end - begin),
                static_cast<int>(c.out_W), t.k0, t.kn);
  for (int row_phase = 0; row_phase < c.phases; ++row_phase)
    for (int phase = 0; phase < c.phases; ++phase) {
      const int64_t row = begin + row_phase;
      t.rows = static_cast<int>((end - row + c.phases - 1) / c.phases);
      t.cols = static_cast<int>((c.out_W - phase + c.phases - 1) / c.phases);
      const int64_t pixels = t.rows > 0 && t.cols > 0 ? int64_t{t.rows} * t.cols : 0;
      if (pixels > 0) {
        Segment segment[kSegmentsMax];
        const int n = segments(c, buffers, panel, width, begin, row, phase, segment);
        gemm_panel(nv, segment, n, pixels, t.cols, acc, width, nullptr);
        t.acc_row = int64_t{t.cols} * width;
        t.pixel = (image * c.out_H + row) * c.out_W + phase;
        c.epilogue.run(c.epilogue, t);
      }
      if (c.epilogue.records) close_strip(c.epilogue, (chunk * c.phases + row_phase) * c.phases + phase, t, pixels);
    }
}

void direct(DirectCall& c, float* statistics) {
  Plan plan = make_plan(c);
  for (int i = 0; i < c.n_sources; ++i) set_geometry(c, i, plan.chunk_rows);
  int64_t chunk_bytes = 0;
  for (int i = 0; i < c.n_sources; ++i) chunk_bytes += c.source[i].rows * c.source[i].cols * c.source[i].padded * 4;
  plan.shared = c.threads > 1 && plan.chunks < 2 * c.threads;
  if (plan.shared) {
    plan.held = kSharedBytes / chunk_bytes;
    plan.held = plan.held < 1 ? 1 : plan.held > plan.chunks ? plan.chunks : plan.held;
  }

  Parts sizes;
  lay_out(sizes, c, plan, statistics);
  Parts parts;
  parts.base = static_cast<char*>(scratch_block(sizes.used));
  const Buffers b = lay_out(parts, c, plan, statistics);
  for (int i = 0; i < c.n_sources; ++i) {
    DirectSource& s = c.source[i];
    s.affine = b.affine[i];
    fill_affine(s.affine, s.prologue, s.C, s.padded);
    if (b.packed[i]) {
      pack_filter(Algo::direct, c.filter[i], b.packed[i], c.threads);
      c.packed[i] = b.packed[i];
    }
  }
  set_records(c.epilogue, b.records, plan.chunks * c.phases * c.phases);
  const int64_t panels = panel_count(c.out_C), multipliers_floats = round_up(b.multipliers_floats, 16);
  const auto rows_of = [&](int64_t chunk, int64_t* begin, int64_t* end) {
    const int64_t part = chunk % plan.per_image;
    *begin = part * c.out_H / plan.per_image;
    *end = (part + 1) * c.out_H / plan.per_image;
    return chunk / plan.per_image;
  };
  const auto fill = [&](int64_t chunk, float* buffer, int64_t from, int64_t to, float* multipliers) {
    int64_t begin, end;
    const int64_t image = rows_of(chunk, &begin, &end);
    for (int i = 0; i < c.n_sources; ++i) {
      const DirectSource& s = c.source[i];
      const int64_t top = first_row(c, i, begin);
      for (int64_t r = from; r < s.rows && r < to; ++r)
        fill_row(s, image, top + r * s.step, buffer + r * s.cols * s.padded, multipliers);
      buffer += b.source_floats[i];
    }
  };

  const Shares shares(b.shares, plan.chunks, plan.shared ? 0 : c.threads);
#pragma omp parallel num_threads(c.threads)
  {
    const int64_t id = omp_get_thread_num();
    float* acc = b.acc + id * b.acc_floats;
    float* multipliers = b.multipliers + id * multipliers_floats;
    int64_t begin, end;
    if (!plan.shared) {
      float* buffer = b.rows + id * b.chunk_floats;
      for (int64_t k = shares.take(id); k >= 0; k = shares.take(id)) {
        fill(k, buffer, 0, INT64_MAX, multipliers);
        const int64_t image = rows_of(k, &begin, &end);
        for (int64_t p = 0; p < panels; ++p) run_panel(c, b, buffer, k, image, begin, end, p, acc);
      }
    } else {
      const int64_t most_rows =
          c.n_sources > 1 && c.source[1].rows > c.source[0].rows ? c.source[1].rows : c.source[0].rows;
      for (int64_t k0 = 0; k0 < plan.chunks; k0 += plan.held) {
        const int64_t k1 = k0 + plan.held < plan.chunks ? k0 + plan.held : plan.chunks;
#pragma omp for collapse(2) schedule(static)
        for (int64_t k = k0; k < k1; ++k)
          for (int64_t r = 0; r < most_rows; ++r) fill(k, b.rows + (k - k0) * b.chunk_floats, r, r + 1, multipliers);
#pragma omp for collapse(2) schedule(dynamic, 1)
        for (int64_t p = 0; p < panels; ++p)
          for (int64_t k = k0; k < k1; ++k) {
            const int64_t image = rows_of(k, &begin, &end);
            run_panel(c, b, b.rows + (k - k0) * b.chunk_floats, k, image, begin, end, p, acc);
          }
      }
    }
  }

  if (statistics) merge_records(c.epilogue, statistics, c.threads);
}

}  // namespace

void direct_fprop(const FpropArgs& a) {
  const ConvShape& s = a.shape;
  DirectCall c = {};
  c.threads = a.threads;
  c.n_sources = a.x_short ? 2 : 1;
  c.source[0].data = a.x;
  c.source[0].dtype = a.dtype;
  c.source[0].H = s.H;
  c.source[0].W = s.W;
  c.source[0].C = s.C;
  c.source[0].prologue = a.prologue;
  c.tap[0] = {s.R, s.S, s.stride, s.pad_top, s.pad_left};
  c.filter[0] = fprop_view(a.w, s.K, s.C, s.R, s.S);
  c.packed[0] = a.packed;
  if (a.x_short) {
    c.source[1].data = a.x_short;
    c.source[1].dtype = a.dtype;
    c.source[1].H = a.short_H;
    c.source[1].W = a.short_W;
    c.source[1].C = a.short_C;
    c.source[1].prologue = a.short_prologue;
    c.tap[1] = {1, 1, a.short_stride, 0, 0};
    c.filter[1] = fprop_view(a.w_short, s.K, a.short_C, 1, 1);
    c.packed[1] = a.packed_short;
  }
  c.N = s.N;
  c.out_H = s.P;
  c.out_W = s.Q;
  c.out_C = s.K;
  c.phases = 1;
  c.epilogue = fprop_epilogue(a, nullptr);
  direct(c, a.stats_y);
}

void direct_dgrad(const DgradArgs& a) {
  const ConvShape& s = a.shape;
  DirectCall c = {};
  c.threads = a.threads;
  c.transposed = true;
  c.n_sources = 1;
  c.source[0].data = a.dy;
  c.source[0].dtype = a.dtype;
  c.source[0].H = s.P;
  c.source[0].W = s.Q;
  c.source[0].C = s.K;
  c.tap[0] = {s.R, s.S, s.stride, s.pad_top, s.pad_left};
  c.filter[0] = dgrad_view(a.w, s.K, s.C, s.R, s.S);
  c.packed[0] = a.packed;
  c.N = s.N;
  c.out_H = s.H;
  c.out_W = s.W;
  c.out_C = s.C;
  c.phases = s.stride;
  c.epilogue = dgrad_epilogue(a);
  direct(c, a.sums_g);
}

}  // namespace WRN_ISA
}  // namespace wrn_fast
