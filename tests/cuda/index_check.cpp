// Every computation of csrc/cuda/sm90_index.h against brute force, for every compiled configuration. Prints the first
// difference and exits with 1.
#include <map>
#include <set>
#include <tuple>
#include <vector>

#include "index_check.h"

namespace {

using namespace wrn_fast;
using namespace wrn_fast::sm90;

void swizzles() {
  // NVIDIA's picture: 16-byte column c of row r moves to column c XOR r, over as many rows as there are columns; for
  // the narrower spans two or four rows share a line of 128 bytes.
  const std::tuple<Swizzle, int> spans[] = {{Swizzle::b128, 128}, {Swizzle::b64, 64}, {Swizzle::b32, 32}};
  for (const auto& [s, span] : spans) {
    std::set<uint32_t> seen;
    for (uint32_t row = 0; row < 64; ++row) {
      for (uint32_t column = 0; column < static_cast<uint32_t>(span) / 16; ++column) {
        const uint32_t line = row * span / 128, moved = column ^ (line % (span / 16));
        CHECK(swizzled(row * span + column * 16, s) == row * span + moved * 16);
        seen.insert(swizzled(row * span + column * 16, s));
      }
    }
    CHECK(seen.size() == 64u * span / 16);
  }
  CHECK(swizzled(12345, Swizzle::none) == 12345);
}

void descriptors() {
  for (uint32_t start = 0; start < kSharedMax; start += 1024 * 7) {
    for (Swizzle s : {Swizzle::none, Swizzle::b128, Swizzle::b64, Swizzle::b32}) {
      const uint64_t d = descriptor(start, 8192, 512, s);
      CHECK((d & 0x3fff) * 16 == start && (d >> 16 & 0x3fff) * 16 == 8192 && (d >> 32 & 0x3fff) * 16 == 512);
      CHECK(static_cast<int>(d >> 62) == static_cast<int>(s) && (d >> 49 & 7) == 0);
      CHECK((descriptor_plus(d, 96) & 0x3fff) * 16 == start + 96);
    }
  }
}

void accumulators() {
  for (int N : kWidths) {
    std::set<std::pair<int, int>> seen;
    for (int warp = 0; warp < 4; ++warp) {
      for (int lane = 0; lane < 32; ++lane) {
        for (int reg = 0; reg < N / 2; ++reg) {
          const int row = acc_row(warp, lane, reg), column = acc_column(lane, reg);
          CHECK(row >= warp * 16 && row < warp * 16 + 16 && column >= 0 && column < N);
          CHECK(acc_reg(reg / 4, reg / 2 % 2, reg % 2) == reg);
          seen.insert({row, column});
        }
      }
    }
    CHECK(seen.size() == 64u * N);
  }
}

// The halving exchange on columns' own numbers: what a lane is left with is what sum_channel() says.
void column_sums() {
  for (int g = 0; g < 10; ++g) {
    std::map<int, int> holders;
    for (int lane = 0; lane < 32; ++lane) {
      std::vector<int> v;
      for (int c = 0; c < 4; ++c) v.push_back(acc_column(lane, acc_reg(2 * g + c / 2, 0, c % 2)));
      for (int half = 2, mask = 16; half; half /= 2, mask /= 2) {
        for (int i = 0; i < half; ++i) v[i] = lane & mask ? v[i + half] : v[i];
      }
      CHECK(sum_channel(g, lane) == v[0] && sum_channel(g, lane ^ 4) == v[0]);
      ++holders[v[0]];
    }
    CHECK(holders.size() == 16 && holders.begin()->first == 16 * g && holders.rbegin()->first == 16 * g + 15);
    for (const auto& [column, lanes] : holders) CHECK(lanes == 2);
  }
}

void tiles() {
  for (int rows_log = 7; rows_log <= 8; ++rows_log) {
    for (int q = 0; q <= 4; ++q) {
      for (int p = 0; p <= 4 && q + p <= rows_log; ++p) {
        const PixelTile t{q, p, 1 << (rows_log - q - p)};
        CHECK(rows_of(t) == 1 << rows_log);
        int row = 0;
        for (int n = 0; n < t.n; ++n) {
          for (int y = 0; y < height_of(t); ++y) {
            for (int x = 0; x < width_of(t); ++x, ++row) {
              const Pixel o = pixel_of_row(t, row);
              CHECK(o.n == n && o.p == y && o.q == x);
            }
          }
        }
        for (Extent e : {Extent{5, 7, 3}, Extent{16, 16, 1}, Extent{19, 3, 130}, Extent{1, 1, 1}}) {
          const Pixel origin{e.Q / width_of(t) * width_of(t), e.P / height_of(t) / 2 * height_of(t), 0};
          for (int run = 4; run <= 6; run += 2) {
            for (int first = 0; first < 1 << rows_log; first += 1 << run) {
              int valid = 0;
              for (int i = 0; i < 1 << run; ++i) valid += row_is_valid(t, origin, e, first + i);
              CHECK(valid_rows(t, origin, e, first, run) == valid);
              // What the moments rely on: a warp's first row is in the image if any is.
              if (run == 4 && valid) CHECK(row_is_valid(t, origin, e, first));
              const PixelTile s = sub_tile(t, run);
              CHECK(rows_of(s) == 1 << run);
              for (int i = 0; i < 1 << run; ++i) {
                const Pixel a = pixel_of_row(t, first), b = pixel_of_row(s, i), c = pixel_of_row(t, first + i);
                CHECK(a.q + b.q == c.q && a.p + b.p == c.p && a.n + b.n == c.n);
              }
            }
          }
        }
        for (int halo = 0; halo <= 2; halo += 2) {
          if ((rows_log == 8 && halo == 0) || fetched_rows(t, halo) > 320) continue;
          int fetched = 0;
          for (int n = 0; n < t.n; ++n) {
            for (int y = 0; y < height_of(t) + halo; ++y) {
              for (int x = 0; x < width_of(t); ++x, ++fetched) {
                const Pixel f = fetched_pixel(t, halo, fetched, 2);
                CHECK(f.n == n && f.p == 2 * y && f.q == 2 * x);
                if (y < height_of(t)) {
                  const int at = (n * height_of(t) + y) * width_of(t) + x;
                  CHECK(a_start(t, halo, at, 0) == static_cast<uint32_t>(fetched * kRowBytes));
                }
              }
            }
          }
          CHECK(fetched == fetched_rows(t, halo));
        }
      }
    }
  }
}

void axes() {
  for (int taps = 1; taps <= 5; ++taps) {
    for (int low = 0; low < 4; ++low) {
      for (int high = 0; high < 4; ++high) {
        for (int step = 1; step <= 2; ++step) {
          for (int size = taps; size < taps + 7; ++size) {
            const int out = (size + low + high - taps) / step + 1;
            const Axis f = fprop_axis(taps, low);
            CHECK(f.count == taps);
            for (int i = 0; i < taps; ++i)
              CHECK(tap_of(f, i) == i && offset_of(f, i) == i - low && shift_of(f, i) == i);
            std::set<std::tuple<int, int, int>> want, got;  // (source position, output, tap)
            for (int p = 0; p < out; ++p) {
              for (int r = 0; r < taps; ++r) {
                if (p * step + r - low >= 0 && p * step + r - low < size) want.insert({p * step + r - low, p, r});
              }
            }
            for (int parity = 0; parity < step; ++parity) {
              const Axis d = dgrad_axis(taps, low, step, parity);
              for (int a = 0; a < class_size(size, step, parity); ++a) {
                for (int i = 0; i < d.count; ++i) {
                  const int p = a + offset_of(d, i);
                  CHECK(shift_of(d, i) >= 0 && shift_of(d, i) < d.count);
                  CHECK(lowest_offset(d) + shift_of(d, i) == offset_of(d, i));
                  if (p >= 0 && p < out) got.insert({step * a + parity, p, tap_of(d, i)});
                }
              }
            }
            CHECK(got == want);
          }
        }
      }
    }
  }
}

void packing() {
  for (int64_t K : {16, 48, 80, 96, 160, 320, 256, 112}) {
    const int block = block_k_of(K);
    CHECK(K % block == 0 && block % 16 == 0 && shared_bytes_of(block, Sm90Tile::fetch9) > 0);
    for (int64_t C : {16, 48, 64, 160}) {
      for (const auto& [R, chunk] : {std::pair{1, kChunk}, {3, kChunk}, {1, kChunk8}, {3, kChunk8}}) {
        const int bytes = kRowBytes / chunk;
        std::set<int64_t> seen;
        for (int64_t k = 0; k < K; ++k) {
          for (int r = 0; r < R; ++r) {
            for (int s = 0; s < 3; ++s) {
              for (int64_t c = 0; c < C; ++c) {
                const int64_t at = packed_offset(K, C, R, 3, k, r, s, c, chunk);
                CHECK(at >= 0 && at < packed_bytes(K, C, R, 3, chunk == kChunk8) && at % bytes == 0);
                const int64_t b = at / (block * kRowBytes), row = at % (block * kRowBytes) / kRowBytes;
                CHECK(b == packed_block(chunks_of(C, chunk), R, 3, k / block, c / chunk, s, r) && row == k % block);
                CHECK(at % kRowBytes / 16 == (c % chunk * bytes / 16 ^ row % 8) && at % 16 == c * bytes % 16);
                seen.insert(at);
              }
            }
          }
        }
        CHECK(seen.size() == static_cast<size_t>(K * C * R * 3));
      }
    }
  }
  for (int64_t C : {16, 32, 48, 64, 80, 160, 320, 640}) {
    int64_t steps = 0, steps8 = 0;
    for (int i = 0; i < chunks_of(C); ++i) steps += k16_steps(C, i);
    for (int i = 0; i < chunks_of(C, kChunk8); ++i) steps8 += k16_steps(C, i, kChunk8);
    CHECK(steps * 16 == C && steps8 == ceil_div(C, 32));
  }
}

void staging() {
  for (int N : kWidths) {
    std::set<uint32_t> seen;
    for (int row = 0; row < 64; ++row) {
      for (int c = 0; c < N; ++c) seen.insert(staging_offset(N, row, c));
    }
    CHECK(seen.size() == 64u * N && *seen.rbegin() == static_cast<uint32_t>(staging_bytes(N)) - 2);
    for (int warp = 0; warp < 4; ++warp) {
      std::set<uint32_t> sums;
      for (int column = 0; column < N; ++column) {
        for (int which = 0; which < 2; ++which) {
          const uint32_t at = exchange_offset(N, warp, which, column);
          // Within what the warp itself reads of the column's plane.
          const int width = plane_channels(N);
          const uint32_t begin = static_cast<uint32_t>((column / width * 64 + warp * 16) * width * 2);
          CHECK(at >= begin && at + 4 <= begin + 16 * width * 2);
          sums.insert(at);
        }
      }
      CHECK(sums.size() == 2u * N);
      for (int pair = 0; pair < N / 16; ++pair) {
        for (int matrix = 0; matrix < 4; ++matrix) {
          std::set<uint32_t> banks;
          for (int i = 0; i < 8; ++i) {
            const int lane = matrix * 8 + i;
            const uint32_t at = stmatrix_offset(N, warp, lane, pair);
            CHECK(at == staging_offset(N, 16 * warp + i + 8 * (matrix % 2), 16 * pair + 8 * (matrix / 2)));
            banks.insert(at % 128 / 16);
          }
          CHECK(banks.size() == 8);
        }
      }
    }
    for (int group = 0; group < 8; ++group) {
      std::set<uint32_t> vectors;
      for (int row = 0; row < 320; ++row) {
        CHECK(a_vector(row, group) / kRowBytes == static_cast<uint32_t>(row));
        vectors.insert(a_vector(row, group) % kRowBytes);
      }
      CHECK(vectors.size() == 8);
    }
  }
}

void rings() {
  for (int size : {2, 5, 8}) {
    Ring r;
    for (int i = 0; i < 40; ++i, r = next(r, size)) {
      CHECK(r.index == i % size && r.phase == static_cast<uint32_t>(i / size % 2));
    }
  }
}

template <int N, int blocks, int row_taps>
void memory() {
  using M = ConvMemory<N, blocks, row_taps>;
  std::vector<std::pair<uint32_t, uint32_t>> regions;
  for (int i = 0; i < M::kAStages; ++i) regions.push_back({M::a(i), M::kABytes});
  for (int i = 0; i < M::kBStages; ++i) regions.push_back({M::b(i), M::kBBytes});
  for (int i = 0; i < kConsumers; ++i) regions.push_back({M::staging(i), M::kStaging});
  uint32_t end = 0;
  for (const auto& [begin, bytes] : regions) {
    CHECK(begin == end && begin % 1024 == 0);
    end = begin + bytes;
  }
  CHECK(M::barrier(0) == end && M::barrier(M::kBarriers) <= M::kBytes && M::kBytes <= 232448);
  for (PixelTile t : {PixelTile{4, 4, 1}, PixelTile{3, 3, 4}}) {
    if (row_taps > 1) CHECK(fetched_rows(t, M::kHalo) * kRowBytes <= M::kABytes);
  }
}

}  // namespace

int main() {
  swizzles();
  descriptors();
  accumulators();
  column_sums();
  tiles();
  axes();
  packing();
  staging();
  rings();
#define CASE(k, tile, blocks, taps) memory<k, blocks, taps>();
  SM90_FETCH9(CASE)
  SM90_SHIFT3(CASE)
#undef CASE
  check_plans();
  std::printf("%ld checks\n", checks);
}
