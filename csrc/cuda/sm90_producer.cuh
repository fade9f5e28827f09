// What the producer warpgroup of the Hopper convolution does: the walk over a job's reduction, fetches of activations
// and filters, the prologue, dropout masks. Not run on a GPU yet.
#pragma once

#include "sm90_dropout.cuh"
#include "sm90_epilogue.cuh"
#include "sm90_hw.cuh"
#include "sm90_plan.h"

namespace wrn_fast {
namespace sm90 {

// One chunk of one source: columns x fetches boxes of activations, each read by `taps` filter rows.
struct Chunk {
  const Source* source;
  bool is_short;
  int chunk, parity, halo, first_column, columns, fetches, taps;
};

// Units of the reduction of a job: the first `main` are the main source's, [begin, end) the split's.
struct Units {
  int main, begin, end;
};
template <class T, class Params>
SM90_FN Units units_of(const Params& p, const Job& j) {
  const int main = chunks_of(p.source.channels, T::chunk) * p.source.columns[j.parity & 1].count;
  const int units = main + chunks_of(p.source_short.channels, T::chunk), splits = p.schedule.splits;
  return {main, split_begin(units, splits, j.split), split_begin(units, splits, j.split + 1)};
}

// The chunks of units [begin, end) of a job, in the order in which all roles walk through the rings. One call of
// `visit`, not one a source: each role has its loop once.
template <class T, class Params, class Visit>
SM90_FN void for_each_chunk(const Params& p, const Job& j, int begin, int end, Visit&& visit) {
  constexpr int row_taps = T::row_taps;
  const int rows = p.source.rows[j.parity >> 1].count, columns = p.source.columns[j.parity & 1].count;
  const int main = units_of<T>(p, j).main;
  for (int u = begin; u < end;) {
    const bool is_short = u >= main;
    const int chunk = is_short ? u - main : u / columns, first = is_short ? 0 : u - chunk * columns;
    const Chunk k{is_short ? &p.source_short : &p.source,
                  is_short,
                  chunk,
                  is_short ? 0 : j.parity,
                  is_short ? 0 : row_taps - 1,
                  first,
                  is_short ? 1 : least(columns - first, end - u),
                  is_short || row_taps > 1 ? 1 : rows,
                  is_short || row_taps == 1 ? 1 : rows};
    visit(k);
    u += k.columns;
  }
}

// Boxes that a job fetches.
template <class T, class Params>
SM90_FN int fetches_of(const Params& p, const Job& j) {
  const Units u = units_of<T>(p, j);
  const int of_main = least(u.end, u.main) - least(u.begin, u.main);
  return u.end - u.begin + of_main * (T::row_taps > 1 ? 0 : p.source.rows[j.parity >> 1].count - 1);
}

template <class T, class Params, class Visit>
SM90_FN void for_each_chunk(const Params& p, const Job& j, Visit&& visit) {
  const Units units = units_of<T>(p, j);
  for_each_chunk<T>(p, j, units.begin, units.end, visit);
}

// Where fetch (column, row) of a chunk starts in its source.
SM90_FN Pixel fetch_origin(const Chunk& k, int column, int row, Pixel origin) {
  const Source& s = *k.source;
  const Axis rows = s.rows[k.parity >> 1], columns = s.columns[k.parity & 1];
  return {origin.q * s.in_stride + offset_of(columns, column),
          origin.p * s.in_stride + (k.halo ? lowest_offset(rows) : offset_of(rows, row)), origin.n};
}

template <class T, class Params>
SM90_FN void fetch_activations(const Params& p, uint32_t base) {
  using M = typename T::Memory;
  Ring a;
  const int jobs = jobs_of(p.schedule);
  for (int job = hw::block(); job < jobs; job += hw::blocks()) {
    const Job j = job_of(p.schedule, job);
    for_each_chunk<T>(p, j, [&](const Chunk& k) {
      const hw::Map* const map = k.is_short ? &p.a_short : &p.a;
      const int bytes = fetched_rows(p.schedule.tile, k.halo) * kRowBytes;
      for (int column = k.first_column; column < k.first_column + k.columns; ++column) {
        for (int row = 0; row < k.fetches; ++row) {
          const Pixel at = fetch_origin(k, column, row, j.origin);
          hw::barrier_wait(base + M::barrier(M::kAEmpty + a.index), a.phase ^ 1);
          const uint32_t fetched = base + M::barrier((p.prologue ? M::kARaw : M::kAFull) + a.index);
          hw::barrier_expect(fetched, bytes);
          hw::load_box4(base + M::a(a.index), map, fetched, k.chunk * T::chunk, at.q, at.p, at.n);
          a = next(a, M::kAStages);
        }
      }
    });
  }
}

template <class T, class Params>
SM90_FN void fetch_filters(const Params& p, uint32_t base) {
  using M = typename T::Memory;
  Ring b;
  const int jobs = jobs_of(p.schedule);
  for (int job = hw::block(); job < jobs; job += hw::blocks()) {
    const Job j = job_of(p.schedule, job);
    for_each_chunk<T>(p, j, [&](const Chunk& k) {
      const Source& s = *k.source;
      const char* const filters = static_cast<const char*>(k.is_short ? p.w_short : p.w);
      const int R = k.is_short ? 1 : p.R, S = k.is_short ? 1 : p.S;
      for (int column = k.first_column; column < k.first_column + k.columns; ++column) {
        for (int i = 0; i < k.fetches * k.taps; ++i) {
          const int64_t block = packed_block(chunks_of(s.channels, T::chunk), R, S, j.k_block, k.chunk,
                                             tap_of(s.columns[k.parity & 1], column), tap_of(s.rows[k.parity >> 1], i));
          hw::barrier_wait(base + M::barrier(M::kBEmpty + b.index), b.phase ^ 1);
          const uint32_t filled = base + M::barrier(M::kBFull + b.index);
          hw::barrier_expect(filled, M::kBBytes);
          hw::load_bytes(base + M::b(b.index), filters + block * M::kBBytes, M::kBBytes, filled);
          b = next(b, M::kBStages);
        }
      }
    });
  }
}

// act(x * scale + shift) of 8 channels of one pixel, in place; zero outside the image.
template <class T>
SM90_FN void transform_vector(const Source& s, uint32_t address, bool in, const float (&scale)[8],
                              const float (&shift)[8]) {
  hw::Vector v = hw::load_vector(address);
  float value[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    value[2 * i] = hw::fused(hw::low_half<T::fp16>(v.word[i]), scale[2 * i], shift[2 * i]);
    value[2 * i + 1] = hw::fused(hw::high_half<T::fp16>(v.word[i]), scale[2 * i + 1], shift[2 * i + 1]);
  }
  activate(value, s.act, s.slope);
#pragma unroll
  for (int i = 0; i < 4; ++i) v.word[i] = in ? hw::pack<T::fp16>(value[2 * i], value[2 * i + 1]) : 0u;
  hw::store_vector(address, v);
}

// The prologue of a job; done(i) after its i-th fetch. A thread keeps one group of 8 channels; channels past the last
// are zero and no product reads them.
template <class T, class Params, class Done>
SM90_FN void transform(const Params& p, uint32_t base, const Job& j, int t, Ring& a, Done&& done) {
  using M = typename T::Memory;
  const int group = t % 8;
  const PixelTile tile = p.schedule.tile;
  int fetch = 0;
  for_each_chunk<T>(p, j, [&](const Chunk& k) {
    const Source& s = *k.source;
    const int channel = k.chunk * kChunk + group * 8;
    const bool mine = s.scale && channel < s.channels;
    float scale[8], shift[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      scale[i] = mine ? hw::from_global(s.scale + channel + i) : 0.f;
      shift[i] = mine ? hw::from_global(s.shift + channel + i) : 0.f;
    }
    const int rows = mine ? fetched_rows(tile, k.halo) : 0;
    for (int column = k.first_column; column < k.first_column + k.columns; ++column) {
      for (int row = 0; row < k.fetches; ++row) {
        const Pixel at = fetch_origin(k, column, row, j.origin);
        hw::barrier_wait(base + M::barrier(M::kARaw + a.index), a.phase);
        for (int i = t / 8; i < rows; i += kTransformers / 8) {
          const Pixel f = fetched_pixel(tile, k.halo, i, s.in_stride);
          transform_vector<T>(s, base + M::a(a.index) + a_vector(i, group),
                              inside({at.q + f.q, at.p + f.p, at.n + f.n}, s.extent), scale, shift);
        }
        hw::fence_async();
        hw::barrier_arrive(base + M::barrier(M::kAFull + a.index));
        a = next(a, M::kAStages);
        done(++fetch);
      }
    }
  });
}

// The transformers: the prologue, and in its pauses the mask of the job.
template <class T, class Params>
SM90_FN void prepare(const Params& p, uint32_t base) {
  const int t = hw::thread() - (kWarpgroup - kTransformers);
  Ring a;
  const int jobs = jobs_of(p.schedule);
  for (int job = hw::block(); job < jobs; job += hw::blocks()) {
    const Job j = job_of(p.schedule, job);
    int drawn = 0;
    if (!T::e4m3 && p.prologue) {
      const int shares = fetches_of<T>(p, j) + 1;
      transform<T>(p, base, j, t, a, [&](int fetch) {
        if (!draws<T>(p)) return;
        const int due = kDrawn<T> * fetch / shares;
        draw<T>(p, base, job, j, t, drawn, due);
        drawn = due;
      });
    }
    if (draws<T>(p)) draw<T>(p, base, job, j, t, drawn, kDrawn<T>);
  }
}

}  // namespace sm90
}  // namespace wrn_fast
