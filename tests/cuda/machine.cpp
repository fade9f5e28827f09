// Fibers, barriers and the record of who touched which word of shared memory.
#include "machine.h"

#include <algorithm>
#include <cstring>

namespace host {

Machine* machine = nullptr;

void Clock::join(const Clock& other) {
  for (int i = 0; i < kAgents; ++i) seen[i] = std::max(seen[i], other.seen[i]);
  for (int i = 0; i < kThreads; ++i) fenced[i] = std::max(fenced[i], other.fenced[i]);
}

void fiber_main() {
  machine->kernel_();
  machine->fiber().finished = true;
  _longjmp(machine->scheduler_, 1);
}

void Machine::fail(const std::string& what) {
  error_ = "block " + std::to_string(block_) + ", " + name(current_) + ": " + what;
  _longjmp(scheduler_, 1);
}

std::string Machine::name(int agent) const {
  if (agent >= kStores) return "the stores of warpgroup " + std::to_string(agent - kStores);
  if (agent >= kProducts) return "the products of warpgroup " + std::to_string(agent - kProducts);
  if (agent >= kLoads) return "the loads of barrier " + std::to_string(agent - kLoads);
  return "thread " + std::to_string(agent);
}

std::string Machine::run(int blocks, int threads, const std::function<void()>& kernel) {
  machine = this;
  kernel_ = kernel;
  blocks_ = blocks;
  threads_ = threads;
  std::vector<int> order(blocks);
  for (int i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random_);
  for (int i = 0; i < threads_; ++i) {
    fibers_.push_back(std::make_unique<Fiber>());
    fibers_.back()->stack = std::make_unique<char[]>(kStackBytes);
  }
  for (int block : order) {
    block_ = block;
    const std::string error = run_block();
    if (!error.empty()) return error;
  }
  return "";
}

void Machine::enter() {
  Fiber& f = fiber();
  if (!f.started) {
    f.started = true;
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack.get();
    f.start.uc_stack.ss_size = kStackBytes;
    f.start.uc_link = nullptr;
    makecontext(&f.start, fiber_main, 0);
    setcontext(&f.start);
  }
  _longjmp(f.env, 1);
}

std::string Machine::run_block() {
  runnable_.clear();
  for (int i = 0; i < threads_; ++i) {
    Fiber& f = *fibers_[i];
    f.started = f.finished = f.ordered = f.prior_ended = false;
    f.clock = Clock();
    f.clock.seen[i] = 1;
    f.products = f.groups = f.stores = f.store_groups = 0;
    runnable_.push_back(i);
  }
  copies_.clear();
  barriers_.clear();
  meetings_.clear();
  for (int i = 0; i < 4; ++i) {
    products_[i].clear();
    executed_[i] = 0;
  }
  shared_.assign(kSharedBase + kSharedBytes, 0xff);  // NaN as fp32, bf16 and fp16
  words_.assign((kSharedBase + kSharedBytes) / 4, Word());
  crowds_.clear();
  error_.clear();
  for (;;) {
    _setjmp(scheduler_);
    if (!error_.empty()) return error_;
    if (!copies_.empty() && (runnable_.empty() || random_() % 64 == 0)) {
      finish_one_copy(random_() % copies_.size());
      continue;
    }
    if (runnable_.empty()) break;
    const size_t i = random_() % runnable_.size();
    current_ = runnable_[i];
    runnable_[i] = runnable_.back();
    runnable_.pop_back();
    enter();
  }
  std::map<std::string, int> waiting;
  for (int i = 0; i < threads_; ++i) {
    if (!fibers_[i]->finished) ++waiting[fibers_[i]->waits_for];
  }
  std::string report;
  for (const auto& [what, threads] : waiting) report += "; " + std::to_string(threads) + " wait for " + what;
  if (!report.empty()) return "block " + std::to_string(block_) + ": deadlock" + report;
  for (const auto& [address, b] : barriers_) {
    if (b.bytes || b.pending != b.count) {
      return "block " + std::to_string(block_) + ": ends within a phase of barrier " + std::to_string(b.agent - kLoads);
    }
  }
  for (int i = 0; i < threads_; ++i) {
    const Fiber& f = *fibers_[i];
    if (f.products != (f.products ? executed_[i / 128] : 0) || f.clock.seen[kStores + i / 128] < f.stores) {
      return "block " + std::to_string(block_) + ": " + name(i) + " ends with products or stores in flight";
    }
  }
  return "";
}

void Machine::wait(std::vector<int>& list, const std::string& reason) {
  Fiber& f = fiber();
  f.waits_for = reason;
  list.push_back(current_);
  if (!_setjmp(f.env)) _longjmp(scheduler_, 1);
}

void Machine::wake(std::vector<int>& list) {
  runnable_.insert(runnable_.end(), list.begin(), list.end());
  list.clear();
}

void Machine::meet(int key, int threads, bool memory, const std::function<void(Meeting&)>& last) {
  Meeting& m = meetings_[key];
  if (memory) {
    m.gathering.join(fiber().clock);
    ++own_time();
  }
  if (++m.arrived > threads) fail("more threads than meet");
  const long generation = m.generation;
  if (m.arrived == threads) {
    if (last) last(m);
    if (memory) {
      for (int t : m.waiting) fibers_[t]->clock.join(m.gathering);
      fiber().clock.join(m.gathering);
    }
    m.gathering = Clock();
    m.arrived = 0;
    ++m.generation;
    wake(m.waiting);
  } else {
    wait(m.waiting, "meeting " + std::to_string(key));
    if (m.generation == generation) fail("woken too early");
  }
}

void Machine::fence_async() {
  fiber().clock.fenced[current_] = own_time();
  ++own_time();
}

// mbarriers.

void Machine::barrier_init(uint32_t address, int count) {
  if (address % 8 || barriers_.count(address)) fail("bad or repeated barrier address");
  Barrier b;
  b.count = b.pending = count;
  b.agent = kLoads + static_cast<int>(barriers_.size());
  if (b.agent >= kProducts) fail("more barriers than this tool has room for");
  barriers_[address] = b;
}

Barrier& Machine::barrier_at(uint32_t address) {
  const auto found = barriers_.find(address);
  if (found == barriers_.end()) fail("no barrier at " + std::to_string(address));
  return found->second;
}

void Machine::complete(Barrier& b) {
  if (b.pending || b.bytes) return;
  ++b.phase;
  b.pending = b.count;
  b.completed = b.gathering;
  b.gathering = Clock();
  wake(b.waiting);
}

void Machine::barrier_arrive(uint32_t address, uint32_t bytes) {
  Barrier& b = barrier_at(address);
  if (b.pending == 0) fail("barrier " + std::to_string(b.agent - kLoads) + " overrun: an arrival too many in a phase");
  b.gathering.join(fiber().clock);
  ++own_time();
  --b.pending;
  b.bytes += bytes;
  complete(b);
}

void Machine::barrier_wait(uint32_t address, uint32_t parity) {
  Barrier& b = barrier_at(address);
  while ((b.phase & 1) == parity) {
    wait(b.waiting, "phase " + std::to_string(b.phase) + " of barrier " + std::to_string(b.agent - kLoads));
  }
  fiber().clock.join(b.completed);
}

// Shared memory.

void Machine::check_read(uint32_t address, int bytes, const Clock& clock, int reader, uint32_t time, bool async) {
  if (address < kSharedBase || address + bytes > kSharedBase + kSharedBytes) fail("read outside shared memory");
  for (uint32_t i = address / 4; i < (address + bytes + 3) / 4; ++i) {
    Word& w = words_[i];
    const auto at = [&] { return " at " + std::to_string(i * 4 - kSharedBase) + " by " + name(reader); };
    if (w.writer < 0) fail("read of shared memory that nobody wrote" + at());
    if (clock.seen[w.writer] < w.write_time) fail("read before " + name(w.writer) + " has surely written" + at());
    if (async && w.writer < kThreads && clock.fenced[w.writer] < w.write_time) {
      fail("read without fence.proxy.async after the write of " + name(w.writer) + at());
    }
    int slot = 0;
    while (slot < 4 && w.reader[slot] >= 0 && w.reader[slot] != reader) ++slot;
    if (slot == 4) {
      crowds_[i][reader] = time;
      continue;
    }
    w.reader[slot] = static_cast<int16_t>(reader);
    w.read_time[slot] = time;
  }
}

void Machine::check_write(uint32_t address, int bytes, const Clock& clock, int writer, uint32_t time, bool async) {
  if (address < kSharedBase || address + bytes > kSharedBase + kSharedBytes) fail("write outside shared memory");
  for (uint32_t i = address / 4; i < (address + bytes + 3) / 4; ++i) {
    Word& w = words_[i];
    const auto at = [&] { return " at " + std::to_string(i * 4 - kSharedBase) + " by " + name(writer); };
    if (w.writer >= 0 && clock.seen[w.writer] < w.write_time) fail("write over a write of " + name(w.writer) + at());
    if (async && w.writer >= 0 && w.writer < kThreads && clock.fenced[w.writer] < w.write_time) {
      fail("write without fence.proxy.async after the write of " + name(w.writer) + at());
    }
    for (int slot = 0; slot < 4 && w.reader[slot] >= 0; ++slot) {
      if (clock.seen[w.reader[slot]] < w.read_time[slot]) {
        fail("write over bytes that " + name(w.reader[slot]) + " may still read" + at());
      }
      w.reader[slot] = -1;
    }
    if (const auto crowd = crowds_.find(i); crowd != crowds_.end()) {
      for (const auto& [reader, read_time] : crowd->second) {
        if (clock.seen[reader] < read_time) fail("write over bytes that " + name(reader) + " may still read" + at());
      }
      crowds_.erase(crowd);
    }
    w.writer = static_cast<int16_t>(writer);
    w.write_time = time;
  }
}

void Machine::read(uint32_t address, void* to, int bytes) {
  if (address % bytes) fail("read off its alignment");
  check_read(address, bytes, fiber().clock, current_, own_time(), false);
  std::memcpy(to, &shared_[address], bytes);
}

void Machine::write(uint32_t address, const void* from, int bytes) {
  if (address % bytes) fail("write off its alignment");
  check_write(address, bytes, fiber().clock, current_, own_time(), false);
  std::memcpy(&shared_[address], from, bytes);
}

}  // namespace host
