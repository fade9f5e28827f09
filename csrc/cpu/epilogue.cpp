// Epilogues of fprop and dgrad on one tile, and the merge of per-strip statistics.
#include "epilogue.h"

#include "act.h"
#include "masks.h"
#include "philox.h"

namespace wrn_fast {
namespace WRN_ISA {
namespace {

// Adds the tile's outputs, which fprop_channels left in acc, to the strip's sums of (y - pivot) and its square. The
// pivot is the mean of the strip's first tile, so a channel with mean 1000 and deviation 1 keeps its digits.
WRN_INLINE void add_moments(const OutTile& t, int c, Vec total) {
  const bool more = t.before > 0;
  const Vec pivot = more ? load(t.state + c) : total * broadcast(1.f / static_cast<float>(t.rows * t.cols));
  Vec sum = more ? load(t.state + NR + c) : zero(), squares = more ? load(t.state + 2 * NR + c) : zero();
  for (int i = 0; i < t.rows; ++i) {
    // Rows first: short chains of additions.
    Vec row_sum = zero(), row_squares = zero();
    for (int j = 0; j < t.cols; ++j) {
      const Vec d = load(t.acc + i * t.acc_row + j * t.acc_col + c) - pivot;
      row_sum += d;
      row_squares = fma(d, d, row_squares);
    }
    sum += row_sum;
    squares += row_squares;
  }
  store(t.state + c, pivot);
  store(t.state + NR + c, sum);
  store(t.state + 2 * NR + c, squares);
}

// y = acc [+ bias + addend] [+ residual], dropout, store, sums, y_act. RARE gathers what few layers use.
template <class T, bool RESIDUAL, bool SUMS, bool RARE>
WRN_INLINE void fprop_channels(const Epilogue& e, const OutTile& t, int c, int n) {
  const FpropArgs& a = *e.fprop;
  T* y = static_cast<T*>(a.y);
  T* y_act = static_cast<T*>(a.y_act);
  const T* residual = static_cast<const T*>(a.residual);
  const T* addend = static_cast<const T*>(e.addend);
  const int64_t k = t.k0 + c;
  Vec bias = zero(), out_scale = broadcast(1.f), out_shift = zero();
  if (RARE && a.bias) bias = load_upto(a.bias + k, n);
  if (RARE && y_act && a.out_scale) out_scale = load_upto(a.out_scale + k, n);
  if (RARE && y_act && a.out_shift) out_shift = load_upto(a.out_shift + k, n);
  Vec total = zero();
  for (int i = 0; i < t.rows; ++i) {
    float* acc = t.acc + i * t.acc_row + c;
    const int64_t pixel0 = t.pixel + i * t.pixel_row;
    DropoutRow keep(a.dropout, pixel0 * e.channels + k, t.pixel_col * e.channels);
    for (int j = 0; j < t.cols; ++j) {
      const int64_t at = (pixel0 + j * t.pixel_col) * e.channels + k;
      Vec v = load(acc + j * t.acc_col);
      if (RARE) v += bias;
      if (RARE && addend) v += load_upto(addend + at, n);
      if (RESIDUAL) v += load_upto(residual + at, n);
      if (RARE && a.dropout.active && !a.drop_act) v *= keep(j);
      if (RARE && y_act) {
        Vec u = activate(a.act_out, fma(v, out_scale, out_shift), broadcast(a.slope_out));
        if (a.dropout.active && a.drop_act) u *= keep(j);
        store_upto(y_act + at, u, n);
      }
      if (SUMS) {
        v = rounded(y, v);
        total += v;
        store(acc + j * t.acc_col, v);
      }
      if (!RARE || y) store_upto(y + at, v, n);
    }
  }
  if (SUMS) add_moments(t, c, total);
}

template <class T, bool RESIDUAL, bool SUMS, bool RARE>
void fprop_tile(const Epilogue& e, const OutTile& t) {
  for (int c = 0; c < t.kn; c += VL) {
    if (t.kn - c >= VL)
      fprop_channels<T, RESIDUAL, SUMS, RARE>(e, t, c, VL);
    else
      fprop_channels<T, RESIDUAL, SUMS, RARE>(e, t, c, t.kn - c);
  }
}

// sum + rest += a, exactly (Knuth's two-sum).
WRN_INLINE void add_exactly(Vec& sum, Vec& rest, Vec a) {
  const Vec s = sum + a, part = s - sum;
  rest += (sum - (s - part)) + (a - part);
  sum = s;
}

// g = da * mask * act'(v); sums of g and g * xhat.
template <class T, Act act, bool SUMS>
WRN_INLINE void dgrad_channels(const Epilogue& e, const OutTile& t, int c, int n) {
  const DgradArgs& a = *e.dgrad;
  const Prologue& p = a.prologue;
  const T* x = static_cast<const T*>(a.x);
  T* g = static_cast<T*>(a.g);
  const int64_t k = t.k0 + c;
  const Vec center = p.center ? load_upto(p.center + k, n) : zero();
  const Vec scale = p.scale ? load_upto(p.scale + k, n) : broadcast(1.f);
  const Vec shift = p.shift ? load_upto(p.shift + k, n) : zero();
  const Vec slope = broadcast(p.slope);
  const Vec rstd = SUMS ? load_upto(a.rstd + k, n) : zero();
  const bool more = SUMS && t.before > 0;
  Vec sum = zero(), sum_rest = zero(), product = zero(), product_rest = zero();
  if (more) {
    sum = load(t.state + c);
    sum_rest = load(t.state + NR + c);
    product = load(t.state + 2 * NR + c);
    product_rest = load(t.state + 3 * NR + c);
  }
  for (int i = 0; i < t.rows; ++i) {
    const float* acc = t.acc + i * t.acc_row + c;
    const int64_t pixel0 = t.pixel + i * t.pixel_row;
    DropoutRow keep(p.dropout, pixel0 * e.channels + k, t.pixel_col * e.channels);
    Vec row_sum = zero(), row_product = zero();
    for (int j = 0; j < t.cols; ++j) {
      const int64_t at = (pixel0 + j * t.pixel_col) * e.channels + k;
      Vec v = load(acc + j * t.acc_col);
      if (p.dropout.active) v *= keep(j);
      if (act != Act::identity || SUMS) {
        const Vec d = load_upto(x + at, n) - center;
        const Vec pre = fma(d, scale, shift);
        // A blend, not a product: an infinite da behind a closed relu is 0, as in PyTorch.
        if (act == Act::relu)
          v = select(less_equal(pre, zero()), zero(), v);
        else
          v *= activate_grad<act>(pre, slope);
        if (SUMS) {
          v = rounded(g, v);
          row_sum += v;
          row_product = fma(v, d * rstd, row_product);
        }
      }
      store_upto(g + at, v, n);
    }
    if (SUMS) {
      add_exactly(sum, sum_rest, row_sum);
      add_exactly(product, product_rest, row_product);
    }
  }
  if (SUMS) {
    store(t.state + c, sum);
    store(t.state + NR + c, sum_rest);
    store(t.state + 2 * NR + c, product);
    store(t.state + 3 * NR + c, product_rest);
  }
}

template <class T, Act act, bool SUMS>
void dgrad_tile(const Epilogue& e, const OutTile& t) {
  for (int c = 0; c < t.kn; c += VL) {
    if (t.kn - c >= VL)
      dgrad_channels<T, act, SUMS>(e, t, c, VL);
    else
      dgrad_channels<T, act, SUMS>(e, t, c, t.kn - c);
  }
}

using TileFn = void (*)(const Epilogue&, const OutTile&);

template <class T>
TileFn fprop_tile_for(bool residual, bool sums, bool rare) {
  if (rare) {
    if (residual) return sums ? fprop_tile<T, true, true, true> : fprop_tile<T, true, false, true>;
    return sums ? fprop_tile<T, false, true, true> : fprop_tile<T, false, false, true>;
  }
  if (residual) return sums ? fprop_tile<T, true, true, false> : fprop_tile<T, true, false, false>;
  return sums ? fprop_tile<T, false, true, false> : fprop_tile<T, false, false, false>;
}

template <class T>
TileFn dgrad_tile_for(Act act, bool sums) {
  switch (act) {
    case Act::relu:
      return sums ? dgrad_tile<T, Act::relu, true> : dgrad_tile<T, Act::relu, false>;
    case Act::leaky_relu:
      return sums ? dgrad_tile<T, Act::leaky_relu, true> : dgrad_tile<T, Act::leaky_relu, false>;
    case Act::silu:
      return sums ? dgrad_tile<T, Act::silu, true> : dgrad_tile<T, Act::silu, false>;
    default:
      return sums ? dgrad_tile<T, Act::identity, true> : dgrad_tile<T, Act::identity, false>;
  }
}

}  // namespace

Epilogue fprop_epilogue(const FpropArgs& args, const void* addend) {
  const bool rare = args.bias || addend || args.dropout.active || args.y_act || !args.y;
  const bool residual = args.residual, sums = args.stats_y, wide = args.dtype == DType::f32;
  Epilogue e = {};
  e.run = wide ? fprop_tile_for<float>(residual, sums, rare) : fprop_tile_for<bf16>(residual, sums, rare);
  e.channels = args.shape.K;
  e.padded = panel_count(e.channels) * NR;
  e.fprop = &args;
  e.addend = addend;
  e.reads = args.residual;
  e.writes = args.y;
  e.element_bytes = wide ? 4 : 2;
  return e;
}

Epilogue dgrad_epilogue(const DgradArgs& args) {
  const bool masked = args.mask || args.out_scale;
  const Act act = args.x ? args.prologue.act : Act::identity;
  const bool sums = args.sums_g, wide = args.dtype == DType::f32;
  Epilogue e = {};
  e.run = masked ? masked_tile(args.dtype, args.prologue.act)
          : wide ? dgrad_tile_for<float>(act, sums)
                 : dgrad_tile_for<bf16>(act, sums);
  e.channels = args.shape.C;
  e.padded = panel_count(e.channels) * NR;
  e.dgrad = &args;
  e.reads = act != Act::identity || sums ? args.x : nullptr;
  e.writes = args.g;
  e.element_bytes = wide ? 4 : 2;
  return e;
}

void close_strip(const Epilogue& e, int64_t strip, const OutTile& t, int64_t pixels) {
  if (t.k0 == 0) e.counts[strip] = static_cast<float>(pixels);
  if (pixels == 0) return;
  float* record = e.records + strip * RECORD * e.padded + t.k0;
  for (int c = 0; c < t.kn; c += VL) {
    for (int i = 0; i < RECORD; ++i) store(record + i * e.padded + c, load(t.state + i * NR + c));
  }
}

namespace {

// (pivot, sums about it) of the strips into mean and variance of all (Chan, Golub, LeVeque 1979).
void merge_statistics(const Epilogue& e, int64_t block, float* stats) {
  double mean[NR] = {}, m2[NR] = {}, total = 0;
  const auto each_strip = [&](auto f) {
    for (int64_t s = 0; s < e.strips; ++s) {
      const double n = static_cast<double>(e.counts[s]);
      const float* record = e.records + s * RECORD * e.padded + block * NR;
      if (n > 0) f(n, record, record + e.padded, record + 2 * e.padded);
    }
  };
  each_strip([&](double n, const float* pivot, const float* sum, const float*) {
    for (int c = 0; c < NR; ++c) mean[c] += n * static_cast<double>(pivot[c]) + static_cast<double>(sum[c]);
    total += n;
  });
  for (int c = 0; c < NR; ++c) mean[c] /= total;
  each_strip([&](double n, const float* pivot, const float* sum, const float* squares) {
    for (int c = 0; c < NR; ++c) {
      const double d = mean[c] - static_cast<double>(pivot[c]);
      m2[c] += static_cast<double>(squares[c]) - d * (2 * static_cast<double>(sum[c]) - n * d);
    }
  });
  for (int c = 0; c < NR && block * NR + c < e.channels; ++c) {
    const double var = m2[c] / total;
    stats[block * NR + c] = static_cast<float>(mean[c]);
    stats[e.channels + block * NR + c] = static_cast<float>(var < 0. ? 0. : var);
  }
}

void merge_sums(const Epilogue& e, int64_t block, float* sums) {
  double first[NR] = {}, second[NR] = {};
  for (int64_t s = 0; s < e.strips; ++s) {
    if (e.counts[s] == 0.f) continue;
    const float* record = e.records + s * RECORD * e.padded + block * NR;
    for (int c = 0; c < NR; ++c) {
      first[c] += static_cast<double>(record[c]) + static_cast<double>(record[e.padded + c]);
      second[c] += static_cast<double>(record[2 * e.padded + c]) + static_cast<double>(record[3 * e.padded + c]);
    }
  }
  for (int c = 0; c < NR && block * NR + c < e.channels; ++c) {
    sums[block * NR + c] = static_cast<float>(first[c]);
    sums[e.channels + block * NR + c] = static_cast<float>(second[c]);
  }
}

}  // namespace

// Channels are independent, so threads may share them; within one channel the order is that of the strips.
void merge_records(const Epilogue& e, float* statistics, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < e.padded / NR; ++block)
    e.fprop ? merge_statistics(e, block, statistics) : merge_sums(e, block, statistics);
}

}  // namespace WRN_ISA
}  // namespace wrn_fast
