// LD_PRELOAD: lets the k-th larger allocation of the armed thread fail.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>

enum { LEAST = 2048 };  // smaller requests are Python's own small change
static __thread long left;  // 0: not armed
static __thread long seen;

void fail_at(long k) {
  left = k;
  seen = 0;
}
long requests(void) { return seen; }

static int fails(size_t bytes) {
  if (bytes < LEAST || left < 0) return 0;
  if (!left) return 0;
  ++seen;
  return --left == 0;
}

void* malloc(size_t bytes) {
  static void* (*real)(size_t);
  if (!real) real = dlsym(RTLD_NEXT, "malloc");
  if (fails(bytes)) return errno = ENOMEM, NULL;
  return real(bytes);
}
void* aligned_alloc(size_t alignment, size_t bytes) {
  static void* (*real)(size_t, size_t);
  if (!real) real = dlsym(RTLD_NEXT, "aligned_alloc");
  if (fails(bytes)) return errno = ENOMEM, NULL;
  return real(alignment, bytes);
}
int posix_memalign(void** where, size_t alignment, size_t bytes) {
  static int (*real)(void**, size_t, size_t);
  if (!real) real = dlsym(RTLD_NEXT, "posix_memalign");
  if (fails(bytes)) return ENOMEM;
  return real(where, alignment, bytes);
}
