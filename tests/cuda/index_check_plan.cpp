// Schedules, splits and whole plans against brute force.
#include <set>
#include <tuple>

#include "index_check.h"

namespace {

using namespace wrn_fast;
using namespace wrn_fast::sm90;

void schedules() {
  const Extent extents[] = {{8, 8, 5}, {16, 16, 3}, {32, 32, 1}, {9, 13, 2}, {1, 1, 300}, {2, 5, 17}, {20, 4, 9}};
  for (Extent e : extents) {
    for (Sm90Tile tile : {Sm90Tile::fetch9, Sm90Tile::shift3}) {
      const PixelTile t = tile_of(tile, e);
      CHECK(rows_of(t) == kConsumers * 64 * blocks_of(tile));
      if (tile == Sm90Tile::shift3) {
        // 64 rows are one run of a fetch, on the swizzle's period, for each shift.
        CHECK(t.q_log >= 3 && t.q_log + t.p_log >= 6);
        for (int row = 0; row < rows_of(t); row += 64) {
          for (int shift = 0; shift < 3; ++shift) CHECK(a_start(t, 2, row, shift) % 1024 == 0);
          for (int i = 0; i < 64; ++i) {
            CHECK(a_start(t, 2, row + i, 1) == a_start(t, 2, row, 1) + static_cast<uint32_t>(i * kRowBytes));
          }
        }
      }
      for (int classes : {1, 4}) {
        const Schedule s = schedule_of(t, e, 3, classes);
        std::set<std::tuple<int, int, int, int, int>> seen;
        std::set<int64_t> parts;
        for (int i = 0; i < jobs_of(s); ++i) {
          const Job j = job_of(s, i);
          CHECK(j.k_block >= 0 && j.k_block < 3 && j.parity >= 0 && j.parity < classes);
          if (j.k_block == 0) {
            for (int b = 0; b < kConsumers * blocks_of(tile); ++b)
              parts.insert(part_of(j.pixel_tile, blocks_of(tile), b));
          }
          for (int row = 0; row < rows_of(t); ++row) {
            if (!row_is_valid(t, j.origin, e, row)) continue;
            const Pixel o = pixel_of_row(t, row);
            const bool fresh =
                seen.insert({j.k_block, j.parity, j.origin.q + o.q, j.origin.p + o.p, j.origin.n + o.n}).second;
            CHECK(fresh);
          }
        }
        CHECK(seen.size() == static_cast<size_t>(3 * classes * e.Q * e.P * e.N));
        CHECK(parts.size() == static_cast<size_t>(pixel_tiles(s)) * kConsumers * blocks_of(tile));
        CHECK(*parts.begin() == 0 && *parts.rbegin() == static_cast<int64_t>(parts.size()) - 1);
        if (classes == 4) CHECK(job_of(s, 0).parity == 3);
      }
    }
  }
}

void splits() {
  for (int units = 1; units < 40; ++units) {
    for (int splits = 1; splits < 12; ++splits) {
      CHECK(split_begin(units, splits, 0) == 0 && split_begin(units, splits, splits) == units);
      for (int i = 0; i < splits; ++i) {
        const int share = split_begin(units, splits, i + 1) - split_begin(units, splits, i);
        CHECK(share == units / splits || share == units / splits + 1);
      }
    }
    for (int jobs : {1, 4, 60, 200}) {
      const int cut = conv_splits(units, jobs, 132);
      CHECK(cut >= 1 && cut <= units && (cut == 1 || cut * jobs <= 132));
    }
  }
  const Schedule whole = schedule_of({4, 3, 1}, {20, 9, 3}, 2, 1);
  Schedule cut = whole;
  cut.splits = 3;
  CHECK(jobs_of(cut) == 3 * jobs_of(whole));
  std::set<int64_t> places;
  for (int i = 0; i < jobs_of(cut); ++i) {
    const Job a = job_of(cut, i), b = job_of(whole, i / 3);
    CHECK(a.split == i % 3 && a.k_block == b.k_block && a.pixel_tile == b.pixel_tile && a.origin.n == b.origin.n);
    CHECK(a.origin.q == b.origin.q && a.origin.p == b.origin.p);
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
      for (int r = 0; r < 32; r += 31) {
        for (int t = 0; t < kWarpgroup; t += 127) places.insert(partial_offset(64, 3, i / 3, consumer, a.split, r, t));
      }
    }
  }
  CHECK(places.size() == static_cast<size_t>(jobs_of(cut)) * kConsumers * 4);
  CHECK(*places.rbegin() == static_cast<int64_t>(jobs_of(cut)) * kConsumers * 32 * kWarpgroup - 1);
}

void wgrad() {
  for (int chunks = 1; chunks <= 10; ++chunks) {
    for (int R : {1, 2, 3, 5}) {
      WgradGrid g{chunks, R, 3, 2, 1};
      g.splits = wgrad_splits(g, 37, 132);
      CHECK(g.splits >= 1 && g.splits <= 37);
      std::set<std::tuple<int, int, int, int, int>> seen;
      for (int i = 0; i < wgrad_jobs(g); ++i) {
        const WgradJob j = wgrad_job(g, i);
        for (int u = 0; u < units_in(g, j.group); ++u) {
          CHECK(unit_chunk(g, j.group, u) < chunks);
          seen.insert({unit_chunk(g, j.group, u), unit_row(g, j.group, u), j.s, j.k_block, j.split});
          // With halo the three units of a group are the rows of one chunk.
          if (R == 3) CHECK(unit_row(g, j.group, u) == u && unit_chunk(g, j.group, u) == j.group);
        }
      }
      CHECK(seen.size() == static_cast<size_t>(chunks * R * 3 * 2 * g.splits));
    }
  }
  for (int N : kWidths) {
    CHECK(wgrad_shared_bytes(N, true) <= 232448 && wgrad_shared_bytes(N, false) <= 232448);
    CHECK(wgrad_dy_step(N) == 16u * plane_channels(N) * 2);
  }
}

// Elements in memory order; the words of a tile's mask side by side, in the memory that the kernel has for them.
template <int block_k, int blocks, int row_taps>
void mask_words_of() {
  using M = ConvMemory<block_k, blocks, row_taps>;
  std::set<uint32_t> words;
  for (int row = 0; row < M::kRows; ++row) {
    for (int k = 0; k < block_k; ++k) {
      const uint32_t at = mask_offset(block_k, row, k);
      CHECK(at % 4 == 0 && at == mask_offset(block_k, row, k / 32 * 32) && at + 4 <= uint32_t{M::kMaskBytes});
      words.insert(at);
    }
  }
  CHECK(words.size() == static_cast<size_t>(M::kMaskBytes) / 4 && words.size() % kTransformers == 0);
  CHECK(M::mask() >= M::barrier(M::kBarriers) && M::mask() + M::kMaskBytes <= M::kBytes);
}

void dropout() {
  const Extent e{5, 7, 3};
  int64_t next = 0;
  for (int n = 0; n < e.N; ++n)
    for (int p = 0; p < e.P; ++p)
      for (int q = 0; q < e.Q; ++q)
        for (int k = 0; k < 48; ++k) CHECK(element_number(e, 48, {q, p, n}, k) == next++);
  // More image rows than an int counts.
  CHECK(element_number({2, 256, 1 << 24}, 640, {1, 255, (1 << 24) - 1}, 639) == (int64_t{1} << 33) * 640 - 1);
#define CASE(k, tile, blocks, taps) mask_words_of<k, blocks, taps>();
  SM90_FETCH9(CASE)
  SM90_SHIFT3(CASE)
#undef CASE
}

// 13,108 images of WRN-28-10's first group: byte offsets past 2^32, element offsets past 2^31.
void large() {
  Sm90Fprop f;
  f.shape = {13108, 32, 32, 160, 160, 32, 32, 3, 3, 1, 1, 1, 1, 1};
  f.x = reinterpret_cast<const void*>(4096);
  f.y = reinterpret_cast<void*>(4096);
  for (Sm90Tile tile : {Sm90Tile::fetch9, Sm90Tile::shift3}) {
    f.tile = tile;
    CHECK(refuses("fprop", f.shape, DType::bf16, tile) == nullptr);
    const ConvParams<MapSpec> p = fprop_params(f);
    const Job last = job_of(p.schedule, jobs_of(p.schedule) - 1);
    CHECK(last.origin.n + p.schedule.tile.n == 13108);
    CHECK(part_of(last.pixel_tile, blocks_of(tile), kConsumers * blocks_of(tile) - 1) + 1 ==
          parts_of(f.shape, false, tile));
    for (const MapSpec& m : {p.a, p.y[0]}) {
      CHECK(m.dims[3] == 13108 && m.strides[2] == 32u * 32 * 160 * 2);
      CHECK(m.strides[2] * m.dims[3] > uint64_t{1} << 32);
    }
  }
  CHECK(refuses("fprop", {int64_t{1} << 25, 8, 8, 16, 16, 8, 8, 3, 3, 1, 1, 1, 1, 1}, DType::bf16, Sm90Tile::fetch9));
}

}  // namespace

void check_plans() {
  schedules();
  splits();
  wgrad();
  dropout();
  large();
}
