// The passes of elementwise.h: each reads its inputs once from memory, and takes its sums from a tile still in cache.
#include "elementwise.h"

#include "act.h"
#include "masks.h"
#include "philox.h"
#include "tiles.h"

namespace wrn_fast {
namespace WRN_ISA {
namespace {

// The multipliers of a tile in rows of tile.width; null without dropout.
WRN_INLINE const float* tile_multipliers(float* buffer, const Dropout& dropout, const Tile& t, int64_t C) {
  if (!dropout.active) return nullptr;
  if (t.width == C) {
    dropout_multipliers(buffer, t.row * C, t.rows * C, dropout);
    return buffer;
  }
  for (int64_t r = 0; r < t.rows; ++r)
    dropout_multipliers(buffer + r * t.width, (t.row + r) * C + t.c, t.width, dropout);
  return buffer;
}

template <class T>
void source_rows(const SourceArgs& args, int64_t begin, int64_t end) {
  const int64_t C = args.C;
  const T* x = static_cast<const T*>(args.x);
  T* a = static_cast<T*>(args.a);
  const Prologue p = args.prologue;
  const Vec slope = broadcast(p.slope);
  float buffer[TILE_ELEMENTS];
  for_tiles(begin, end, C, [&](const Tile& t) {
    const float* keep = tile_multipliers(buffer, p.dropout, t, C);
    for (int64_t r = 0; r < t.rows; ++r) {
      const int64_t row = (t.row + r) * C + t.c;
      for (int64_t c = 0; c < t.width; c += VL) {
        const int64_t left = t.width - c;
        Vec v = pre_activation(p, load_upto(x + row + c, left), t.c + c, left);
        v = activate(p.act, v, slope);
        if (keep) v = v * load_upto(keep + r * t.width + c, left);
        store_upto(a + row + c, v, left);
      }
    }
  });
}

template <class T>
void bn_bwd_rows(const BnBwdArgs& args, int64_t begin, int64_t end) {
  const int64_t C = args.C;
  const T* g = static_cast<const T*>(args.g);
  const T* x = static_cast<const T*>(args.x);
  T* dx = static_cast<T*>(args.dx);
  const Vec per_row = broadcast(static_cast<float>(1. / static_cast<double>(larger(1, args.rows))));
  for (int64_t r = begin; r < end; ++r) {
    const int64_t row = r * C;
    for (int64_t c = 0; c < C; c += VL) {
      const int64_t left = C - c;
      Vec v = load_upto(g + row + c, left);
      if (args.sums) {
        const Vec mean_g = load_upto(args.sums + c, left) * per_row;
        const Vec mean_gx = load_upto(args.sums + C + c, left) * per_row * load_upto(args.rstd + c, left);
        v = fnma(load_upto(x + row + c, left) - load_upto(args.mean + c, left), mean_gx, v - mean_g);
      }
      store_upto(dx + row + c, v * load_upto(args.scale + c, left), left);
    }
  }
}

// f(chunk, begin, end) for all chunks, on `threads` threads.
template <class F>
WRN_INLINE void for_chunks(const Chunks& chunks, int threads, F f) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && chunks.count > 1)
  for (int64_t i = 0; i < chunks.count; ++i) f(i, chunks.begin(i), chunks.end(i));
}

void source(const SourceArgs& args) {
  const Chunks chunks(args.rows, args.C);
  for_chunks(chunks, args.threads, [&](int64_t, int64_t begin, int64_t end) {
    args.dtype == DType::f32 ? source_rows<float>(args, begin, end) : source_rows<bf16>(args, begin, end);
  });
}

void bn_bwd(const BnBwdArgs& args) {
  const Chunks chunks(args.rows, args.C);
  for_chunks(chunks, args.threads, [&](int64_t, int64_t begin, int64_t end) {
    args.dtype == DType::f32 ? bn_bwd_rows<float>(args, begin, end) : bn_bwd_rows<bf16>(args, begin, end);
  });
}

template <class T>
void stats_rows(const StatsArgs& args, int64_t begin, int64_t end, double* mean, double* m2) {
  const T* x = static_cast<const T*>(args.x);
  for_tiles(begin, end, args.C, [&](const Tile& t) {
    add_moments(x + t.row * args.C + t.c, args.C, t.rows, t.width, mean + t.c, m2 + t.c,
                static_cast<double>(t.row - begin));
  });
}

void stats(const StatsArgs& args) {
  const Chunks chunks(args.rows, args.C);
  const Partials partials(chunks, args.C, true);
  for_chunks(chunks, args.threads, [&](int64_t i, int64_t begin, int64_t end) {
    args.dtype == DType::f32 ? stats_rows<float>(args, begin, end, partials.first(i), partials.second(i))
                             : stats_rows<bf16>(args, begin, end, partials.first(i), partials.second(i));
  });
  finish_moments(partials, chunks, args.C, args.stats);
}

}  // namespace

extern const Passes passes;
const Passes passes = {source, bn_bwd, stats, act_mask};

}  // namespace WRN_ISA
}  // namespace wrn_fast
