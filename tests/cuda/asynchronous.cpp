// TMA and wgmma of the machine, from NVIDIA's tables: boxes, fills and swizzles; descriptors and accumulators.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "host_hw.h"

namespace host {

namespace {

// XOR of address bits 4.. with bits 7..: 3, 2 or 1 bits for the spans of 128, 64 and 32 bytes. `code` is wgmma's.
uint32_t unswizzle(uint32_t address, int code) {
  const uint32_t mask = code == 1 ? 7 : code == 2 ? 3 : code == 3 ? 1 : 0;
  return address ^ ((address >> 7 & mask) << 4);
}
const int kSpan[4] = {16, 128, 64, 32};

}  // namespace

// Calls visit(byte offset in the box, address or null) for each element of a box; its bytes in shared memory.
uint64_t Machine::elements(const MapSpec& map, std::array<int, 5> at,
                           const std::function<void(uint64_t, char*)>& visit) {
  uint64_t count[5] = {1, 1, 1, 1, 1}, total = 1;
  for (int d = 0; d < map.rank; ++d) {
    count[d] = d ? (map.box[d] + map.steps[d] - 1) / map.steps[d] : map.box[0];
    total *= count[d];
  }
  for (uint64_t i = 0; i < total; i += count[0]) {
    uint64_t rest = i / count[0], offset = 0;
    bool in = true;
    for (int d = 1; d < map.rank; ++d) {
      const int64_t c = at[d] + static_cast<int64_t>(rest % count[d] * map.steps[d]);
      rest /= count[d];
      in = in && c >= 0 && c < static_cast<int64_t>(map.dims[d]);
      offset += c * map.strides[d - 1];
    }
    for (uint64_t c = 0; c < count[0]; ++c) {
      const int64_t x = at[0] + static_cast<int64_t>(c);
      char* address = nullptr;
      if (in && x >= 0 && x < static_cast<int64_t>(map.dims[0])) {
        address = const_cast<char*>(static_cast<const char*>(map.base)) + offset + x * map.element;
        check_global(address, map.element);
      }
      visit((i + c) * map.element, address);
    }
  }
  return total * map.element;
}

void Machine::check_global(const char* begin, uint64_t bytes) {
  for (const Region& r : regions_) {
    if (begin >= r.begin && begin + bytes <= r.end) return;
  }
  fail("a bulk copy leaves the tensors");
}

void Machine::check_map(const MapSpec& map, uint32_t shared) {
  const int code = static_cast<int>(map.swizzle);
  bool good = map.rank >= 3 && map.rank <= 5 && reinterpret_cast<uintptr_t>(map.base) % 16 == 0;
  for (int d = 0; d < map.rank; ++d) {
    good = good && map.dims[d] >= 1 && map.dims[d] <= 1ull << 32 && map.box[d] >= 1 && map.box[d] <= 256 &&
           map.steps[d] >= 1 && map.steps[d] <= 8;
    if (d) good = good && map.strides[d - 1] % 16 == 0 && map.strides[d - 1] < 1ull << 40;
  }
  const int row = static_cast<int>(map.box[0]) * map.element;
  good = good && row % 16 == 0 && (code == 0 || row <= kSpan[code]);
  // The pattern repeats every 8 rows of its span.
  good = good && shared % (code == 0 ? 128 : 8 * kSpan[code]) == 0;
  if (!good) fail("a tensor map or its shared-memory address breaks the rules");
}

void Machine::issue_load(uint32_t to, uint32_t bytes, uint32_t barrier, std::function<void()> copy) {
  Barrier& b = barrier_at(barrier);
  const uint32_t time = static_cast<uint32_t>(b.phase) + 1;
  check_write(to, static_cast<int>(bytes), fiber().clock, b.agent, time, true);
  std::memset(&shared_[to], 0xff, bytes);
  copies_.push_back({-1, 0, [this, &b, bytes, time, copy = std::move(copy), clock = fiber().clock] {
                       copy();
                       b.gathering.join(clock);
                       b.gathering.seen[b.agent] = time;
                       b.bytes -= bytes;
                       if (b.bytes < 0) fail("barrier " + std::to_string(b.agent - kLoads) + ": bytes not announced");
                       complete(b);
                     }});
}

void Machine::load_box(uint32_t to, const MapSpec& map, uint32_t barrier, std::array<int, 5> at) {
  needs_prior_grid();
  check_map(map, to);
  const uint64_t bytes = elements(map, at, [](uint64_t, char*) {});
  issue_load(to, static_cast<uint32_t>(bytes), barrier, [this, to, &map, at] {
    elements(map, at, [&](uint64_t offset, char* from) {
      char* const where = reinterpret_cast<char*>(
          &shared_[unswizzle(to + static_cast<uint32_t>(offset), static_cast<int>(map.swizzle))]);
      if (from) {
        std::memcpy(where, from, map.element);
      } else {
        std::memset(where, 0, map.element);
      }
    });
  });
}

void Machine::load_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  if (to % 16 || bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16) fail("a bulk copy off 16 bytes");
  check_global(static_cast<const char*>(from), bytes);
  issue_load(to, bytes, barrier, [this, to, from, bytes] { std::memcpy(&shared_[to], from, bytes); });
}

void Machine::store_box(const MapSpec& map, uint32_t from, std::array<int, 5> at) {
  needs_prior_grid();
  check_map(map, from);
  const int agent = kStores + current_ / 128;
  const uint64_t bytes = elements(map, at, [](uint64_t, char*) {});
  fiber().stores = fiber().store_groups + 1;
  check_read(from, static_cast<int>(bytes), fiber().clock, agent, static_cast<uint32_t>(fiber().stores), true);
  copies_.push_back({current_, fiber().stores, [this, from, &map, at] {
                       elements(map, at, [&](uint64_t offset, char* to) {
                         const uint32_t where =
                             unswizzle(from + static_cast<uint32_t>(offset), static_cast<int>(map.swizzle));
                         if (to) std::memcpy(to, &shared_[where], map.element);
                       });
                     }});
}

void Machine::store_commit() {
  ++fiber().store_groups;
}

void Machine::store_wait_read() {
  for (size_t i = copies_.size(); i-- > 0;) {
    if (copies_[i].thread == current_ && copies_[i].group <= fiber().store_groups) finish_one_copy(i);
  }
  uint32_t& seen = fiber().clock.seen[kStores + current_ / 128];
  seen = std::max(seen, static_cast<uint32_t>(fiber().store_groups));
}

void Machine::finish_one_copy(size_t i) {
  const Copy copy = std::move(copies_[i]);
  copies_.erase(copies_.begin() + i);
  copy.done();
}

// Products of a warpgroup. The i-th call of each of its threads is one instruction.

void Machine::product(int N, Format format, bool transpose, float* acc, uint64_t a, uint64_t b) {
  Fiber& f = fiber();
  const int group = current_ / 128;
  if (!f.ordered) fail("wgmma without wgmma.fence");
  std::deque<Product>& queue = products_[group];
  const long index = f.products++ - executed_[group];
  if (index == static_cast<long>(queue.size())) {
    queue.emplace_back();
    Product& p = queue.back();
    p.N = N;
    p.format = format;
    p.transpose = transpose;
    p.a = a;
    p.b = b;
    p.group = f.groups + 1;
  }
  Product& p = queue[index];
  if (p.N != N || p.a != a || p.b != b || p.group != f.groups + 1) fail("threads of a warpgroup issue different wgmma");
  p.acc[current_ % 128] = acc;
  if (++p.contributors == 128) check_product(group, p);
}

void Machine::check_product(int group, const Product& p) {
  // What all four warps know; which lane speaks for its warp is drawn.
  Clock clock = fibers_[group * 128 + random_() % 32]->clock;
  for (int warp = 1; warp < 4; ++warp) {
    const Clock& other = fibers_[group * 128 + warp * 32 + random_() % 32]->clock;
    for (int i = 0; i < kAgents; ++i) clock.seen[i] = std::min(clock.seen[i], other.seen[i]);
    for (int i = 0; i < kThreads; ++i) clock.fenced[i] = std::min(clock.fenced[i], other.fenced[i]);
  }
  for (const auto& [descriptor, rows] : {std::pair<uint64_t, int>{p.a, 64}, {p.b, p.N}}) {
    for (int row = 0; row < rows; ++row) {
      // 32 bytes: 16 numbers, or 32 of 8 bits.
      for (int k = 0; k < 16; k += 2) {
        const uint32_t address = element_address(descriptor, row, k, p.transpose) & ~3u;
        // Two numbers are a word in either major order; MN-major rows come in pairs.
        if (!p.transpose || row % 2 == 0) {
          check_read(address, 4, clock, kProducts + group, static_cast<uint32_t>(p.group), true);
        }
        if (p.transpose && row % 2 == 0) {
          check_read(element_address(descriptor, row, k + 1, true) & ~3u, 4, clock, kProducts + group,
                     static_cast<uint32_t>(p.group), true);
        }
      }
    }
  }
}

// Address of element (row, k) of an operand from its descriptor; 8-bit numbers are K-major and swizzled.
uint32_t Machine::element_address(uint64_t descriptor, int i, int k, bool mn_major, int bytes) {
  const uint32_t start = (descriptor & 0x3fff) << 4, lbo = (descriptor >> 16 & 0x3fff) << 4,
                 sbo = (descriptor >> 32 & 0x3fff) << 4;
  const int code = static_cast<int>(descriptor >> 62), span = kSpan[code];
  uint32_t offset;
  if (!mn_major) {
    offset = code ? i % 8 * span + i / 8 * sbo + bytes * k : i % 8 * 16 + i / 8 * sbo + k / 8 * lbo + k % 8 * 2;
  } else {
    const int T = span / 2;
    offset = code ? i % T * 2 + i / T * lbo + k % 8 * span + k / 8 * sbo
                  : i % 8 * 2 + i / 8 * sbo + k % 8 * 16 + k / 8 * lbo;
  }
  return unswizzle(start + offset, code);
}

// e4m3 without infinities: 4 bits of exponent, bias 7, 3 of mantissa; all ones is NaN.
float from_e4m3(uint8_t v) {
  const int exponent = v >> 3 & 15, fraction = v & 7;
  const float size =
      exponent ? std::ldexp(8.f + fraction, exponent - 10) : std::ldexp(static_cast<float>(fraction), -9);
  return (v & 0x7f) == 0x7f ? NAN : v & 0x80 ? -size : size;
}

std::vector<float> Machine::operand(uint64_t descriptor, int rows, Format format, bool mn_major) {
  const int bytes = format == Format::e4m3 ? 1 : 2, depth = 32 / bytes;
  std::vector<float> v(depth * rows);
  for (int i = 0; i < rows; ++i) {
    for (int k = 0; k < depth; ++k) {
      uint16_t bits = 0;
      std::memcpy(&bits, &shared_[element_address(descriptor, i, k, mn_major, bytes)], bytes);
      v[k * rows + i] = format == Format::e4m3   ? from_e4m3(static_cast<uint8_t>(bits))
                        : format == Format::fp16 ? wrn_fast::sm90::hw::from_fp16(bits)
                                                 : wrn_fast::sm90::hw::from_bf16(bits);
    }
  }
  return v;
}

void Machine::compute(const Product& p) {
  const std::vector<float> a = operand(p.a, 64, p.format, p.transpose), b = operand(p.b, p.N, p.format, p.transpose);
  const int depth = static_cast<int>(a.size()) / 64;
  std::vector<float> row(p.N);
  for (int i = 0; i < 64; ++i) {
    std::fill(row.begin(), row.end(), 0.f);
    for (int k = 0; k < depth; ++k) {
      const float x = a[k * 64 + i];
      const float* const y = &b[k * p.N];
      for (int n = 0; n < p.N; ++n) row[n] += x * y[n];
    }
    // Row 16 w + l / 4 + 8 h, column 8 j + 2 (l % 4) + b is register 4 j + 2 h + b of lane l of warp w.
    for (int n = 0; n < p.N; ++n) {
      const int thread = i / 16 * 32 + i % 8 * 4 + n % 8 / 2;
      p.acc[thread][n / 8 * 4 + i % 16 / 8 * 2 + n % 2] += row[n];
    }
  }
}

void Machine::commit_products() {
  ++fiber().groups;
  fiber().ordered = false;
}

void Machine::wait_products(int pending) {
  const int group = current_ / 128;
  const long done = fiber().groups - pending;
  meet(128 + group, 128, false, [&](Meeting&) {
    std::deque<Product>& queue = products_[group];
    // Late, but not always as late as possible.
    const long until = done + (random_() % 4 == 0 ? pending : 0);
    while (!queue.empty() && queue.front().group <= until) {
      if (queue.front().contributors != 128) fail("a wgmma that not all threads of the warpgroup issued");
      compute(queue.front());
      queue.pop_front();
      ++executed_[group];
    }
  });
  if (done > 0) {
    uint32_t& seen = fiber().clock.seen[kProducts + group];
    seen = std::max(seen, static_cast<uint32_t>(done));
  }
}

}  // namespace host

namespace wrn_fast {
namespace sm90 {
namespace hw {

float from_bf16(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
uint16_t to_bf16(float v) {
  if (v != v) return 0x7fff;
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float from_fp16(uint16_t v) {
  const int exponent = v >> 10 & 31, fraction = v & 0x3ff;
  const float sign = v & 0x8000 ? -1.f : 1.f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign *
         (exponent ? std::ldexp(1024.f + fraction, exponent - 25) : std::ldexp(static_cast<float>(fraction), -24));
}
uint16_t to_fp16(float v) {
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  if (v != v) return 0x7fff;
  const float size = std::fabs(v);
  if (size == 0.f) return sign;
  if (size >= 65520.f) return sign | 0x7c00;
  int exponent = 0;
  std::frexp(size, &exponent);
  // Units of the last place: 2^-24 below the normal numbers. nearbyint rounds to even.
  const int unit = std::max(exponent - 11, -24);
  const int count = static_cast<int>(std::nearbyint(std::ldexp(size, -unit)));
  return sign | static_cast<uint16_t>(unit == -24 ? count : ((unit + 24) << 10) + count);
}

}  // namespace hw
}  // namespace sm90
}  // namespace wrn_fast
