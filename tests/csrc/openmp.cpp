// The part of OpenMP's runtime that csrc/cpu uses, made of threads that ThreadSanitizer understands. GCC's own runtime
// synchronises by futexes that it cannot see, so every barrier there looks like a race.
//
// What is handed out of a loop is a relaxed counter: it orders nothing, so it hides no race either.
#include <pthread.h>

#include <atomic>
#include <thread>
#include <vector>

namespace {

constexpr int kLoops = 4096;  // worksharing loops of one region

struct Team {
  int size;
  pthread_barrier_t barrier;
  std::vector<std::atomic<long>> next;

  explicit Team(int size_) : size(size_), next(kLoops) { pthread_barrier_init(&barrier, nullptr, size_); }
  ~Team() { pthread_barrier_destroy(&barrier); }
};

struct Loop {
  long begin, end, step, chunk;
};

thread_local Team* team = nullptr;
thread_local int thread_id = 0;
thread_local int loops = 0;
thread_local Loop loop;

bool take(long* begin, long* end) {
  const long at = team->next[loops - 1].fetch_add(loop.chunk, std::memory_order_relaxed);
  const long total = (loop.end - loop.begin + loop.step - 1) / loop.step;
  if (at >= total) return false;
  *begin = loop.begin + at * loop.step;
  *end = at + loop.chunk < total ? *begin + loop.chunk * loop.step : loop.end;
  return true;
}

}  // namespace

extern "C" {

void GOMP_barrier() {
  if (team) pthread_barrier_wait(&team->barrier);
}

void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned) {
  Team here(static_cast<int>(threads ? threads : 2));
  const auto run = [&](int id) {
    team = &here;
    thread_id = id;
    loops = 0;
    function(data);
    team = nullptr;
    thread_id = 0;
  };
  std::vector<std::thread> others;
  for (int id = 1; id < here.size; ++id) others.emplace_back(run, id);
  run(0);
  for (std::thread& other : others) other.join();
}

bool GOMP_loop_nonmonotonic_dynamic_start(long begin, long end, long step, long chunk, long* first, long* last) {
  ++loops;
  loop = {begin, end, step, chunk};
  return take(first, last);
}
bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) {
  return take(first, last);
}
void GOMP_loop_end() {
  GOMP_barrier();
}
void GOMP_loop_end_nowait() {}

int omp_get_thread_num() {
  return thread_id;
}
int omp_get_num_threads() {
  return team ? team->size : 1;
}
}
