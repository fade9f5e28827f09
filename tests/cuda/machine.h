// A thread block of a Hopper GPU on the CPU, for tests: threads are fibers in a random seeded order; shared memory,
// mbarriers, TMA and wgmma are modelled from their documentation, apart from the formulas of the code under test.
//
// Every access to shared memory is checked by vector clocks, so what is reported does not depend on luck in the order:
// a read of bytes nobody wrote or whose write is not known to have finished, a write over bytes that may still be read,
// and bytes of ordinary stores that TMA or wgmma reads without fence.proxy.async. Barriers report overruns and wrong
// byte counts; a block that cannot go on reports who waits for what.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "sm90_plan.h"

namespace host {

using wrn_fast::sm90::MapSpec;

constexpr int kThreads = 512;  // at most
constexpr int kBarrierAgents = 64;
// Who reads or writes: threads; loads by their barrier; products and stores by their warpgroup.
constexpr int kLoads = kThreads, kProducts = kLoads + kBarrierAgents, kStores = kProducts + 4, kAgents = kStores + 4;
constexpr uint32_t kSharedBase = 1024, kSharedBytes = 232448;
constexpr size_t kStackBytes = 64 << 10;

// seen[a]: everything that agent a did up to that time has happened before. fenced[t]: and what thread t wrote up to
// that time is visible to TMA and wgmma.
struct Clock {
  std::array<uint32_t, kAgents> seen{};
  std::array<uint32_t, kThreads> fenced{};
  void join(const Clock& other);
};

struct Word {
  uint32_t write_time = 0, read_time[4] = {};
  int16_t writer = -1, reader[4] = {-1, -1, -1, -1};
};

struct Fiber {
  ucontext_t start;
  jmp_buf env;
  std::unique_ptr<char[]> stack;
  bool started = false, finished = false;
  std::string waits_for;
  Clock clock;
  long products = 0, groups = 0, stores = 0, store_groups = 0;
  bool ordered = false;      // wgmma.fence since the last commit
  bool prior_ended = false;  // griddepcontrol.wait was called
};

struct Barrier {
  int count = 0, pending = 0, agent = 0;
  long phase = 0;
  int64_t bytes = 0;
  Clock gathering, completed;
  std::vector<int> waiting;
};

// Threads that wait for each other: bar.sync, shuffles, .sync.aligned instructions.
struct Meeting {
  int arrived = 0;
  Clock gathering;
  std::vector<int> waiting;
  float values[2][32];
  uint32_t words[2][32][5];
  long generation = 0;
};

// Of the operands of a product.
enum class Format { bf16, fp16, e4m3 };

struct Product {
  int N = 0, contributors = 0;
  Format format = Format::bf16;
  bool transpose = false;
  uint64_t a = 0, b = 0;
  long group = 0;
  std::array<float*, 128> acc{};
};

// A copy in flight: done() moves the bytes and signals.
struct Copy {
  int thread = -1;  // of a store
  long group = 0;
  std::function<void()> done;
};

struct Region {
  const char* begin;
  const char* end;
};

class Machine {
 public:
  explicit Machine(uint64_t seed) : random_(seed) {}

  // Memory that bulk copies may touch.
  void allow(const void* begin, int64_t bytes) {
    if (begin) regions_.push_back({static_cast<const char*>(begin), static_cast<const char*>(begin) + bytes});
  }
  // Runs every block, in random order. "" or what went wrong.
  std::string run(int blocks, int threads, const std::function<void()>& kernel);

  // What the instructions do; the current fiber calls.
  int thread() const { return current_; }
  int block() const { return block_; }
  int blocks() const { return blocks_; }
  int threads() const { return threads_; }
  void barrier_init(uint32_t address, int count);
  void barrier_arrive(uint32_t address, uint32_t bytes);
  void barrier_wait(uint32_t address, uint32_t parity);
  // All `threads` meet; with `memory` they see each other's accesses afterwards.
  void meet(int key, int threads, bool memory, const std::function<void(Meeting&)>& last = {});
  Meeting& meeting(int key) { return meetings_[key]; }
  void fence_async();
  void wait_for_prior_grid() { fiber().prior_ended = true; }
  // Everything but the filters may come from the grid before, or still be read by it.
  void needs_prior_grid() {
    if (!fiber().prior_ended) fail("global memory is touched before griddepcontrol.wait");
  }
  void load_box(uint32_t to, const MapSpec& map, uint32_t barrier, std::array<int, 5> at);
  void load_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier);
  void store_box(const MapSpec& map, uint32_t from, std::array<int, 5> at);
  void store_commit();
  void store_wait_read();
  void order_products() { fiber().ordered = true; }
  void product(int N, Format format, bool transpose, float* acc, uint64_t a, uint64_t b);
  void commit_products();
  void wait_products(int pending);
  void read(uint32_t address, void* to, int bytes);
  void write(uint32_t address, const void* from, int bytes);
  [[noreturn]] void fail(const std::string& what);

 private:
  Fiber& fiber() { return *fibers_[current_]; }
  uint32_t& own_time() { return fiber().clock.seen[current_]; }
  std::string run_block();
  void enter();
  void wait(std::vector<int>& list, const std::string& reason);
  void wake(std::vector<int>& list);
  void finish_one_copy(size_t i);
  Barrier& barrier_at(uint32_t address);
  void complete(Barrier& b);
  void check_read(uint32_t address, int bytes, const Clock& clock, int reader, uint32_t time, bool async);
  void check_write(uint32_t address, int bytes, const Clock& clock, int writer, uint32_t time, bool async);
  std::string name(int agent) const;
  uint64_t elements(const MapSpec& map, std::array<int, 5> at, const std::function<void(uint64_t, char*)>& visit);
  void check_map(const MapSpec& map, uint32_t shared);
  void check_global(const char* begin, uint64_t bytes);
  void issue_load(uint32_t to, uint32_t bytes, uint32_t barrier, std::function<void()> copy);
  void check_product(int group, const Product& p);
  void compute(const Product& p);
  static uint32_t element_address(uint64_t descriptor, int row, int k, bool mn_major, int bytes = 2);
  std::vector<float> operand(uint64_t descriptor, int rows, Format format, bool transpose);

  std::mt19937_64 random_;
  std::vector<Region> regions_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<int> runnable_;
  std::vector<Copy> copies_;
  std::map<uint32_t, Barrier> barriers_;
  std::map<int, Meeting> meetings_;
  std::deque<Product> products_[4];
  long executed_[4] = {};
  std::vector<uint8_t> shared_;
  std::vector<Word> words_;
  // Readers of a word beyond the four that it has room for, with their times.
  std::map<uint32_t, std::map<int, uint32_t>> crowds_;
  std::function<void()> kernel_;
  jmp_buf scheduler_;
  int current_ = 0, block_ = 0, blocks_ = 1, threads_ = 0;
  std::string error_;

  friend void fiber_main();
};

extern Machine* machine;

}  // namespace host
