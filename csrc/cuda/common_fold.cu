// BatchNorm with given statistics as bn(x) = x * scale + shift, all of a model in one launch.
//
//   rstd = 1 / sqrt(var + eps)   scale = gamma * rstd   shift = beta - mean * scale
#include <algorithm>

#include "common_rows.cuh"

namespace wrn_fast {
namespace cuda {
namespace {

// A BatchNorm and the number of its first block.
struct FoldBlocks : Fold {
  int first;
};

template <class W>
struct FoldNorms {
  using Shared = NoShared;

  FoldBlocks norms[kMostFolds];
  int count;

  WRN_DEVICE void operator()(const Block& block, Shared&) const {
    int i = 0;
    while (i + 1 < count && norms[i + 1].first <= block.x) ++i;
    const FoldBlocks& f = norms[i];
    block.each([&](int t) {
      const int c = (static_cast<int>(block.x) - f.first) * kThreads + t;
      if (c >= f.C) return;
      const W mean = number<W>(f.mean, f.stats_dtype, c);
      const W var = number<W>(f.var, f.stats_dtype, c), rstd = reciprocal_deviation(var, static_cast<W>(f.eps));
      const W scale = f.gamma ? rstd * number<W>(f.gamma, f.affine_dtype, c) : rstd;
      W* const table = static_cast<W*>(f.table);
      table[c] = scale;
      table[f.C + c] = (f.beta ? number<W>(f.beta, f.affine_dtype, c) : W(0)) - mean * scale;
      table[2 * f.C + c] = mean;
      table[3 * f.C + c] = rstd;
      W* const stats = static_cast<W*>(f.stats);
      if (!stats) return;
      stats[c] = mean;
      stats[f.C + c] = var;
    });
  }
};

}  // namespace

void fold_norms(const Fold* folds, int count, DType wide, Stream stream) {
  with_wide(wide, [&](auto zero) {
    FoldNorms<decltype(zero)> kernel{};
    for (int done = 0; done < count; done += kernel.count) {
      int blocks = 0;
      kernel.count = std::min(kMostFolds, count - done);
      for (int i = 0; i < kernel.count; ++i) {
        static_cast<Fold&>(kernel.norms[i]) = folds[done + i];
        kernel.norms[i].first = blocks;
        blocks += static_cast<int>(ceil_div(folds[done + i].C, kThreads));
      }
      launch(blocks, 1, kernel, stream);
    }
  });
}

}  // namespace cuda
}  // namespace wrn_fast
