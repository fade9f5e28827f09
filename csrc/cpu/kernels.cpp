// The kernel table of the instruction set that this object is compiled for.
#include "conv.h"
#include "gemm.h"
#include "isa.h"
#include "wgrad.h"

#define WRN_STRING_(x) #x
#define WRN_STRING(x) WRN_STRING_(x)

namespace wrn_fast {
namespace WRN_ISA {

extern const Kernels table;
const Kernels table = {WRN_STRING(WRN_ISA), VL, NR, fprop, dgrad, wgrad, packed_size, pack};

}  // namespace WRN_ISA
}  // namespace wrn_fast
