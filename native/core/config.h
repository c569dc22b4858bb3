// What the headers of this folder need from the compiler. They hold the per-element maths, which
// the CPU and the CUDA kernels only loop over.
#pragma once

#include <cstdint>
#include <cstring>

// Forced inlining is not for speed alone: the CPU kernels are compiled once per instruction set,
// and an out-of-line copy shared by the linker could be the one that this processor cannot run.
#if defined(__CUDACC__)
#define GQSGD_MEMBER __host__ __device__ __forceinline__
#else
#define GQSGD_MEMBER inline __attribute__((always_inline))
#endif
#define GQSGD_INLINE static GQSGD_MEMBER

namespace gqsgd {

template <class To, class From>
GQSGD_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs types of one size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// 2^exponent, for exponents of normal floats.
GQSGD_INLINE float power_of_two(int exponent) { return bit_cast<float>((exponent + 127) << 23); }

// Correctly rounded, as IEEE 754 has it, so the same everywhere.
#if defined(__CUDA_ARCH__)
GQSGD_INLINE float square_root(float x) { return __fsqrt_rn(x); }
GQSGD_INLINE double square_root(double x) { return __dsqrt_rn(x); }
#else
GQSGD_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
GQSGD_INLINE double square_root(double x) { return __builtin_sqrt(x); }
#endif

}  // namespace gqsgd
