// The kernel table of one instruction set, and the choice of one at load.
//
// Kernel sources are compiled once per instruction set (see vec.h) and export wrn_fast::<isa>::table through
// kernels.cpp. isa.cpp, compiled once for the baseline, picks the widest that the processor has;
// WRN_FAST_ISA=avx512|avx2|portable narrows the choice. setup.py defines WRN_HAVE_AVX512 and WRN_HAVE_AVX2 for
// isa.cpp when those objects are linked in.
#pragma once

#include "../problem.h"

namespace wrn_fast {

struct Kernels {
  const char* name;
  int vector_length;  // floats
  int panel_width;    // output channels in one packed weight panel: part of the key of a cached pack

  // conv.cpp: see the argument structs in problem.h. std::bad_alloc when scratch cannot be had.
  void (*fprop)(const FpropArgs&);
  void (*dgrad)(const DgradArgs&);
  void (*wgrad)(const WgradArgs&);
  int64_t (*packed_size)(const PackArgs&);  // floats
  void (*pack)(const PackArgs&);
};

// Throws std::invalid_argument when WRN_FAST_ISA names a set that this processor or this build lacks.
const Kernels& kernels();

// Null when this build lacks it; does not ask the processor.
const Kernels* kernels_named(const char* name);

// What WRN_FAST_PIN_ALGO asks for: `batch` keeps the batch size out of the choice, an algorithm runs wherever it can.
enum class Pin : int32_t { none, batch, f4, f3, f2, direct };

// The documented policy: which algorithm an exact-by-default fp32/bf16 call runs. It reads the shape and the batch,
// never the thread count, so bits depend on the batch only here, and not at all under a pin.
Algo choose_algo(const ConvShape& shape, bool dgrad, Pin pin);

// f4 stands for F(3x3,4x4): there is no f2 form.
Algo choose_wgrad_algo(const ConvShape& shape);

namespace avx512 {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace portable {
extern const Kernels table;
}

}  // namespace wrn_fast
