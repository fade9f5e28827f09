// The head: BatchNorm, activation, mean over the image, classes; in one launch.
//
//   f[n, c] = mean over pixels of act(bn(y))   out[n, k] = f w^T + bias, or |f / max(|f|, 1e-12) w^T + bias|
//
// A block owns an image and 64 classes: it adds up the image, 16 bytes a thread, then takes the products, 8 classes at
// a time by 32 threads each. Every sum has one order.
#include "common_rows.cuh"

namespace wrn_fast {
namespace cuda {
namespace {

constexpr int kSlots = 8;                   // classes that are worked on side by side
constexpr int kShare = kThreads / kSlots;   // threads of a class
constexpr int kRounds = 8;                  // classes of a thread
constexpr int kClasses = kSlots * kRounds;  // of a block
constexpr double kLeastNorm = 1e-12;        // as F.normalize

template <class T, class S, int V>
struct ClassifyImage {
  using W = Wide<T>;
  static_assert(V <= kRounds, "the sums of an image share their memory with those of the classes");
  struct Shared {
    W feature[kMostFeatures];
    W partial[kRounds][kThreads];
  };

  Walk walk;
  const T* y;
  const W *stats, *gamma, *beta;
  const S* w;
  const W* bias;
  T *out, *feat;
  double eps, slope;
  int pixels, C, K;
  Act act;
  bool cosine;

  WRN_DEVICE void operator()(const Block& block, Shared& s) const {
    auto& sums = reinterpret_cast<W(&)[V][kThreads]>(s.partial);
    const T* const image = y + block.x * pixels * C;
    for (int tile = 0; tile < walk.tiles_y; ++tile) {
      block.each([&](int t) {
        const Place place(walk, tile, t);
        W sum[V] = {};
        if (place.active) {
          const int c = place.vector * V;
          const Normalization<V, W> bn(stats, gamma, beta, C, static_cast<W>(eps), c);
          Vector<T, V> in[kInFlight];
          each_row<kInFlight>(
              walk, place, 0, pixels, [&](int u, int64_t row) { in[u] = load<V>(image + row * C + c); },
              [&](int u, int64_t) {
#pragma unroll
                for (int j = 0; j < V; ++j) {
                  W v = widen(in[u].v[j]);
                  if (stats) v = bn(v, j);
                  sum[j] += activate(v, act, static_cast<W>(slope));
                }
              });
        }
#pragma unroll
        for (int j = 0; j < V; ++j) sums[j][t] = sum[j];
      });
      add_lanes(block, walk.columns, walk.lanes, sums);
      block.each([&](int t) {
        const Place place(walk, tile, t);
        if (!place.active || place.lane > 0) return;
#pragma unroll
        for (int j = 0; j < V; ++j) s.feature[place.vector * V + j] = sums[j][t] / static_cast<W>(pixels);
      });
    }
    if (block.y == 0) {
      block.each([&](int t) {
        for (int c = t; c < C; c += kThreads) feat[block.x * C + c] = narrow<T>(s.feature[c]);
      });
    }
    if (cosine) normalize(block, s);
    block.each([&](int t) {
      const int slot = t / kShare;
      for (int j = 0; j < kRounds; ++j) {
        const int k = block.y * kClasses + j * kSlots + slot;
        W sum = 0;
        if (k < K) {
          const S* const row = w + static_cast<int64_t>(k) * C;
          for (int c = t % kShare; c < C; c += kShare) sum += s.feature[c] * static_cast<W>(widen(row[c]));
        }
        s.partial[j][t] = sum;
      }
    });
    block.each([&](int t) {
      const int k = block.y * kClasses + t;
      if (t >= kClasses || k >= K) return;
      W sum = 0;
      // Each thread begins at a share of its own, so that their reads fall on different banks.
      for (int i = 0; i < kShare; ++i) sum += s.partial[t / kSlots][t % kSlots * kShare + (i + t) % kShare];
      if (bias) sum += bias[k];
      out[block.x * K + k] = narrow<T>(cosine && sum < W(0) ? -sum : sum);
    });
  }

  WRN_DEVICE void normalize(const Block& block, Shared& s) const {
    auto& squares = reinterpret_cast<W(&)[1][kThreads]>(s.partial);
    block.each([&](int t) {
      W sum = 0;
      for (int c = t; c < C; c += kThreads) sum += s.feature[c] * s.feature[c];
      squares[0][t] = sum;
    });
    add_lanes(block, 1, kThreads, squares);
    block.each([&](int t) {
      const W norm = sqrt(squares[0][0]),
              divisor = norm < static_cast<W>(kLeastNorm) ? static_cast<W>(kLeastNorm) : norm;
      for (int c = t; c < C; c += kThreads) s.feature[c] /= divisor;
    });
  }
};

}  // namespace

void head(const Head& h, Stream stream) {
  with_type(h.dtype, [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    const auto start = [&](auto of_w, auto vector) {
      using S = decltype(of_w);
      constexpr int V = decltype(vector)::value;
      launch(h.N, static_cast<int>(ceil_div(h.K, kClasses)),
             ClassifyImage<T, S, V>{Walk(h.C / V), static_cast<const T*>(h.y), static_cast<const W*>(h.norm.stats),
                                    static_cast<const W*>(h.norm.gamma), static_cast<const W*>(h.norm.beta),
                                    static_cast<const S*>(h.w), static_cast<const W*>(h.bias), static_cast<T*>(h.out),
                                    static_cast<T*>(h.feat), h.norm.eps, h.slope, h.pixels, h.C, h.K, h.act, h.cosine},
             stream);
    };
    const auto choose = [&](auto of_w) {
      if (in_vectors({h.dtype, h.pixels, h.C}, h.y, h.y, h.y)) return start(of_w, Int<16 / sizeof(T)>());
      start(of_w, Int<1>());
    };
    if (h.w_dtype == h.dtype) return choose(T());
    choose(float());
  });
}

}  // namespace cuda
}  // namespace wrn_fast
