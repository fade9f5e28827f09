// The passes of elementwise.h: each reads its inputs once from memory, and takes its sums from a tile still in cache.
#include "elementwise.h"

#include "act.h"
#include "philox.h"
#include "tiles.h"

namespace wrn_fast {
namespace WRN_ISA {
namespace {

// v of the prologue; absent arrays are skipped. c counts channels, n the channels left from c on.
WRN_INLINE Vec pre_activation(const Prologue& p, Vec x, int64_t c, int64_t n) {
    if (p.center) x -= load_upto(p.center + c, n);
    if (p.scale && p.shift) return fma(x, load_upto(p.scale + c, n), load_upto(p.shift + c, n));
    if (p.scale) return x * load_upto(p.scale + c, n);
    if (p.shift) return x + load_upto(p.shift + c, n);
    return x;
}

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
void epilogue_rows(const EpilogueArgs& args, int64_t begin, int64_t end, double* mean, double* m2) {
    const int64_t C = args.C;
    T* y = static_cast<T*>(args.y);
    T* y_act = static_cast<T*>(args.y_act);
    const T* shortcut = static_cast<const T*>(args.shortcut);
    const T* residual = static_cast<const T*>(args.residual);
    const Vec slope = broadcast(args.slope_out);
    float buffer[TILE_ELEMENTS];
    for_tiles(begin, end, C, [&](const Tile& t) {
        const float* keep = tile_multipliers(buffer, args.dropout, t, C);
        for (int64_t r = 0; r < t.rows; ++r) {
            const int64_t row = (t.row + r) * C + t.c;
            for (int64_t c = 0; c < t.width; c += VL) {
                const int64_t left = t.width - c;
                Vec v = load_upto(y + row + c, left);
                if (args.bias) v += load_upto(args.bias + t.c + c, left);
                if (shortcut) v += load_upto(shortcut + row + c, left);
                if (residual) v += load_upto(residual + row + c, left);
                if (keep && !args.drop_act) v = v * load_upto(keep + r * t.width + c, left);
                store_upto(y + row + c, v, left);
                if (!y_act) continue;
                if (args.out_scale) v = v * load_upto(args.out_scale + t.c + c, left);
                if (args.out_shift) v += load_upto(args.out_shift + t.c + c, left);
                v = activate(args.act_out, v, slope);
                if (keep && args.drop_act) v = v * load_upto(keep + r * t.width + c, left);
                store_upto(y_act + row + c, v, left);
            }
        }
        if (args.stats)
            add_moments(y + t.row * C + t.c, C, t.rows, t.width, mean + t.c, m2 + t.c,
                        static_cast<double>(t.row - begin));
    });
}

// Adds sums of g and g * (x - center) over the tile; x null: of g alone.
template <class T>
WRN_INLINE void add_products(const T* g, const T* x, const float* center, int64_t C, const Tile& t, double* sum_g,
                             double* sum_gx) {
    for (int64_t c = t.c; c < t.c + t.width; c += VL) {
        const int64_t left = smaller(VL, t.c + t.width - c);
        const Vec mean = center ? load_upto(center + c, left) : zero();
        Vec s0 = zero(), s1 = zero();
        for (int64_t r = 0; r < t.rows; ++r) {
            const int64_t at = (t.row + r) * C + c;
            const Vec v = load_upto(g + at, left);
            s0 += v;
            s1 = fma(v, load_upto(x + at, left) - mean, s1);
        }
        float part0[VL], part1[VL];
        store(part0, s0);
        store(part1, s1);
        for (int64_t i = 0; i < left; ++i) {
            sum_g[c + i] += static_cast<double>(part0[i]);
            sum_gx[c + i] += static_cast<double>(part1[i]);
        }
    }
}

template <class T>
void source_grad_rows(const SourceGradArgs& args, int64_t begin, int64_t end, double* sum_g, double* sum_gx) {
    const int64_t C = args.C;
    const T* da = static_cast<const T*>(args.da);
    const T* x = static_cast<const T*>(args.x);
    T* g = static_cast<T*>(args.g);
    const Prologue p = args.prologue;
    const Vec slope = broadcast(p.slope);
    float buffer[TILE_ELEMENTS];
    for_tiles(begin, end, C, [&](const Tile& t) {
        const float* keep = tile_multipliers(buffer, p.dropout, t, C);
        for (int64_t r = 0; r < t.rows; ++r) {
            const int64_t row = (t.row + r) * C + t.c;
            for (int64_t c = 0; c < t.width; c += VL) {
                const int64_t left = t.width - c;
                Vec v = load_upto(da + row + c, left);
                if (keep) v = v * load_upto(keep + r * t.width + c, left);
                if (p.act != Act::identity) {
                    const Vec pre = pre_activation(p, load_upto(x + row + c, left), t.c + c, left);
                    // A blend, not a product: an infinite da behind a closed relu is 0, as in PyTorch.
                    v = p.act == Act::relu ? select(less_equal(pre, zero()), zero(), v)
                                           : v * activate_grad(p.act, pre, slope);
                }
                store_upto(g + row + c, v, left);
            }
        }
        if (args.sums) add_products(g, x, p.center, C, t, sum_g, sum_gx);
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

void epilogue(const EpilogueArgs& args) {
    const Chunks chunks(args.rows, args.C);
    const Partials partials(chunks, args.C, args.stats != nullptr);
    for_chunks(chunks, args.threads, [&](int64_t i, int64_t begin, int64_t end) {
        double* mean = args.stats ? partials.first(i) : nullptr;
        double* m2 = args.stats ? partials.second(i) : nullptr;
        args.dtype == DType::f32 ? epilogue_rows<float>(args, begin, end, mean, m2)
                                 : epilogue_rows<bf16>(args, begin, end, mean, m2);
    });
    if (args.stats) finish_moments(partials, chunks, args.C, args.stats);
}

void source_grad(const SourceGradArgs& args) {
    const Chunks chunks(args.rows, args.C);
    const Partials partials(chunks, args.C, args.sums != nullptr);
    for_chunks(chunks, args.threads, [&](int64_t i, int64_t begin, int64_t end) {
        double* sum_g = args.sums ? partials.first(i) : nullptr;
        double* sum_gx = args.sums ? partials.second(i) : nullptr;
        args.dtype == DType::f32 ? source_grad_rows<float>(args, begin, end, sum_g, sum_gx)
                                 : source_grad_rows<bf16>(args, begin, end, sum_g, sum_gx);
    });
    if (!args.sums) return;
    double *sum_g = partials.first(0), *sum_gx = partials.second(0);
    for (int64_t i = 1; i < chunks.count; ++i)
        for (int64_t c = 0; c < args.C; ++c) {
            sum_g[c] += partials.first(i)[c];
            sum_gx[c] += partials.second(i)[c];
        }
    for (int64_t c = 0; c < args.C; ++c) {
        args.sums[c] = static_cast<float>(sum_g[c]);
        args.sums[args.C + c] = static_cast<float>(sum_gx[c] * static_cast<double>(args.rstd[c]));
    }
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
const Passes passes = {source, epilogue, source_grad, bn_bwd, stats};

}  // namespace WRN_ISA
}  // namespace wrn_fast
