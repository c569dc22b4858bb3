// Element types. `load` and `store` convert to and from the type of the arithmetic (float, and
// double for double); `magnitude` gives the bits of |x|, which order as integers the way the
// numbers do, with infinity above all numbers and NaN above infinity.
#pragma once

#include "core/config.h"

namespace gqsgd {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The arithmetic type `Real`, and the integer `Norm` that a block maximum travels as.
template <class T>
struct Traits {
  using Real = float;
  using Norm = int32_t;
};
template <>
struct Traits<double> {
  using Real = double;
  using Norm = int64_t;
};

GQSGD_INLINE float load(float x) { return x; }
GQSGD_INLINE double load(double x) { return x; }
GQSGD_INLINE float load(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
GQSGD_INLINE float load(Half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  // Normal numbers move to the exponent of a float (+112), infinity and NaN to its top (+224).
  const uint32_t special = static_cast<uint32_t>(magnitude >= 0x7c00u) * (112u << 23);
  const uint32_t normal = (magnitude << 13) + (112u << 23) + special;
  // 0.5 + m * 2^-24 is exact for a subnormal's ten bits m, and so is the difference.
  const float subnormal = bit_cast<float>(0x3f000000u | magnitude) - 0.5f;
  const uint32_t bits = magnitude < 0x0400u ? bit_cast<uint32_t>(subnormal) : normal;
  return bit_cast<float>(sign | bits);
}

// All stores round to nearest, ties to even.
GQSGD_INLINE void store(float* to, float x) { *to = x; }
GQSGD_INLINE void store(double* to, double x) { *to = x; }
GQSGD_INLINE void store(BFloat16* to, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x0040u;
  to->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}
GQSGD_INLINE void store(Half* to, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // From 2^16 on, infinity.
  const uint32_t most = magnitude < (143u << 23) ? magnitude : 143u << 23;
  const uint32_t normal = (most - (112u << 23) + 0xfffu + ((most >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves just the bits of a half's subnormal, rounded by the addition.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(most) + 0.5f) - 0x3f000000u;
  const uint32_t quiet_nan = static_cast<uint32_t>(magnitude > 0x7f800000u) << 9;
  const uint32_t half = (most < (113u << 23) ? subnormal : normal) | quiet_nan;
  to->bits = static_cast<uint16_t>(sign | half);
}

GQSGD_INLINE int32_t magnitude(float x) { return bit_cast<int32_t>(x) & 0x7fffffff; }
GQSGD_INLINE int64_t magnitude(double x) { return bit_cast<int64_t>(x) & 0x7fffffffffffffff; }
GQSGD_INLINE int16_t magnitude(Half x) { return static_cast<int16_t>(x.bits & 0x7fff); }
GQSGD_INLINE int16_t magnitude(BFloat16 x) { return static_cast<int16_t>(x.bits & 0x7fff); }

// A block's largest magnitude, in the form that travels: the bits of a float (or of a double).
GQSGD_INLINE int32_t norm_from_magnitude(float, int32_t bits) { return bits; }
GQSGD_INLINE int64_t norm_from_magnitude(double, int64_t bits) { return bits; }
GQSGD_INLINE int32_t norm_from_magnitude(BFloat16, int16_t bits) { return bits << 16; }
GQSGD_INLINE int32_t norm_from_magnitude(Half, int16_t bits) {
  return bit_cast<int32_t>(load(Half{static_cast<uint16_t>(bits)}));
}

GQSGD_INLINE bool is_finite_norm(int32_t bits) { return bits < 0x7f800000; }
GQSGD_INLINE bool is_finite_norm(int64_t bits) { return bits < 0x7ff0000000000000; }

GQSGD_INLINE int32_t largest_finite(int32_t) { return 0x7f7fffff; }
GQSGD_INLINE int64_t largest_finite(int64_t) { return 0x7fefffffffffffff; }

// Bits of a number as the type that norms have.
GQSGD_INLINE int32_t bits_of(float x) { return bit_cast<int32_t>(x); }
GQSGD_INLINE int64_t bits_of(double x) { return bit_cast<int64_t>(x); }

GQSGD_INLINE float quiet_nan(int32_t) { return bit_cast<float>(0x7fc00000); }
GQSGD_INLINE double quiet_nan(int64_t) { return bit_cast<double>(int64_t{0x7ff8000000000000}); }

}  // namespace gqsgd
