// Which kernel table this process uses. Compiled once, for the baseline.
#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace wrn_fast {
namespace {

bool processor_has(const char* name) {
#if defined(__x86_64__)
  if (!strcmp(name, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
  if (!strcmp(name, "avx2"))
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return !strcmp(name, "portable");
}

const Kernels& choose() {
  const char* wanted = getenv("WRN_FAST_ISA");
  if (wanted && *wanted) {
    const Kernels* table = kernels_named(wanted);
    if (!table)
      throw std::invalid_argument(std::string("WRN_FAST_ISA: expected avx512, avx2 or portable as built, got ") +
                                  wanted);
    if (!processor_has(wanted))
      throw std::invalid_argument(std::string("WRN_FAST_ISA: this processor lacks ") + wanted);
    return *table;
  }
  for (const char* name : {"avx512", "avx2"}) {
    const Kernels* table = kernels_named(name);
    if (table && processor_has(name)) return *table;
  }
  return portable::table;
}

}  // namespace

const Kernels* kernels_named(const char* name) {
#if defined(WRN_HAVE_AVX512)
  if (!strcmp(name, "avx512")) return &avx512::table;
#endif
#if defined(WRN_HAVE_AVX2)
  if (!strcmp(name, "avx2")) return &avx2::table;
#endif
  return strcmp(name, "portable") ? nullptr : &portable::table;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace wrn_fast
