// wgmma of 64 x N x 16 (e4m3: 32) with both operands in shared memory, fp32 accumulators. Not run on a GPU yet.
//
// One instance an N: the instruction names each accumulator register.
#pragma once

#include <cstdint>

namespace wrn_fast {
namespace sm90 {
namespace hw {

// Register names %0.. of the assembler text and their operands, eight at a time.
#define SM90_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define SM90_R16 SM90_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define SM90_R24 SM90_R16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define SM90_R32 SM90_R24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define SM90_R40 SM90_R32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define SM90_R48 SM90_R40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define SM90_R56 SM90_R48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define SM90_R64 SM90_R56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define SM90_R72 SM90_R64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define SM90_R80 SM90_R72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define SM90_D8(i)                                                                                            \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define SM90_O8 SM90_D8(0)
#define SM90_O16 SM90_O8, SM90_D8(8)
#define SM90_O24 SM90_O16, SM90_D8(16)
#define SM90_O32 SM90_O24, SM90_D8(24)
#define SM90_O40 SM90_O32, SM90_D8(32)
#define SM90_O48 SM90_O40, SM90_D8(40)
#define SM90_O56 SM90_O48, SM90_D8(48)
#define SM90_O64 SM90_O56, SM90_D8(56)
#define SM90_O72 SM90_O64, SM90_D8(64)
#define SM90_O80 SM90_O72, SM90_D8(72)

template <int N, bool fp16, int transpose>
struct Wgmma;

// A, B: numbers of the operands after the registers. transpose: both operands MN-major.
#define SM90_WGMMA(N, R, A, B, T_A, T_B, TYPE, FP16)                                      \
  template <int transpose>                                                                \
  struct Wgmma<N, FP16, transpose> {                                                      \
    static __device__ __forceinline__ void issue(float (&d)[R], uint64_t a, uint64_t b) { \
      asm volatile(                                                                       \
          "{\n.reg .pred accumulate;\nsetp.eq.u32 accumulate, 1, 1;\n"                    \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" SM90_R##R  \
          "}, %" #A ", %" #B ", accumulate, 1, 1, %" #T_A ", %" #T_B ";\n}\n"             \
          : SM90_O##R                                                                     \
          : "l"(a), "l"(b), "n"(transpose), "n"(transpose));                              \
    }                                                                                     \
  };
template <int N>
struct WgmmaE4m3;

// Both operands K-major: 8-bit types have no other order.
#define SM90_WGMMA_E4M3(N, R, A, B)                                                                         \
  template <>                                                                                               \
  struct WgmmaE4m3<N> {                                                                                     \
    static __device__ __forceinline__ void issue(float (&d)[R], uint64_t a, uint64_t b) {                   \
      asm volatile(                                                                                         \
          "{\n.reg .pred accumulate;\nsetp.eq.u32 accumulate, 1, 1;\n"                                      \
          "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" SM90_R##R "}, %" #A ", %" #B         \
                                                                                 ", accumulate, 1, 1;\n}\n" \
          : SM90_O##R                                                                                       \
          : "l"(a), "l"(b));                                                                                \
    }                                                                                                       \
  };
#define SM90_WGMMA_TYPES(N, R, A, B, T_A, T_B)    \
  SM90_WGMMA(N, R, A, B, T_A, T_B, "bf16", false) \
  SM90_WGMMA(N, R, A, B, T_A, T_B, "f16", true)   \
  SM90_WGMMA_E4M3(N, R, A, B)

SM90_WGMMA_TYPES(16, 8, 8, 9, 10, 11)
SM90_WGMMA_TYPES(32, 16, 16, 17, 18, 19)
SM90_WGMMA_TYPES(48, 24, 24, 25, 26, 27)
SM90_WGMMA_TYPES(64, 32, 32, 33, 34, 35)
SM90_WGMMA_TYPES(80, 40, 40, 41, 42, 43)
SM90_WGMMA_TYPES(96, 48, 48, 49, 50, 51)
SM90_WGMMA_TYPES(128, 64, 64, 65, 66, 67)
SM90_WGMMA_TYPES(160, 80, 80, 81, 82, 83)

#undef SM90_WGMMA_TYPES
#undef SM90_WGMMA_E4M3
#undef SM90_WGMMA
}  // namespace hw
}  // namespace sm90
}  // namespace wrn_fast
