// Exponential dithering: levels 0 and +-2^-k of the norm. An element y = x / M between 2^-(k+1) and
// 2^-k goes up with the probability (y - 2^-(k+1)) / 2^-(k+1), so its code is right on average.
// Global-QSGD (arXiv 2305.18627), exponential dithering; natural compression (arXiv 1905.10988).
//
// A code is a sign and an exponent: 8 bits hold the levels 2^0 .. 2^-126, 4 bits 2^0 .. 2^-6; the
// exponent 0 is the level 0. The fraction of a float is just the probability of going up, so the
// rounding is one integer addition to the bits of y, which carries into the exponent.
#pragma once

#include "core/args.h"
#include "core/config.h"
#include "core/linear.h"

namespace gqsgd {

// The exponent of the level 1.
template <int kBits>
constexpr uint32_t kTopExponent = (1u << (kBits - 1)) - 1;

template <int kBits>
GQSGD_INLINE uint32_t exponential_code(float y, uint32_t dither) {
  constexpr uint32_t kOne = 0x3f800000;
  // The lowest level, as the exponent of a float; a float's own lowest normal one at 8 bits.
  constexpr uint32_t kLowest = 128 - kTopExponent<kBits>;
  const uint32_t bits = bit_cast<uint32_t>(y), sign = bits >> 31;
  uint32_t magnitude = bits & 0x7fffffffu;
  magnitude = magnitude < kOne ? magnitude : kOne;  // a rounding error, or a NaN
  // How many levels lie at or below, and 23 binary places of the way to the next one.
  int32_t place = static_cast<int32_t>(magnitude - ((kLowest - 1) << 23));
  if (kLowest > 1) {
    // Below the lowest level numbers are spaced evenly. (At 8 bits floats are so by themselves.)
    // There `place` falls short of that; above, this is cut to what is never more than `place`.
    constexpr float kPlaces = 1u << (22 + (kBits < 8 ? kTopExponent<kBits> : 0));
    const int32_t even = static_cast<int32_t>(bit_cast<float>(magnitude) * kPlaces);
    const int32_t below = even < (1 << 23) ? even : 1 << 23;
    place = place > below ? place : below;
  }
  return (static_cast<uint32_t>(place) + (dither >> 9)) >> 23 | sign << (kBits - 1);
}

// The level that a code stands for, from -1 to 1. Bits above the code are not looked at.
template <int kBits>
GQSGD_INLINE float exponential_level(uint32_t code) {
  const uint32_t exponent = code & kTopExponent<kBits>, sign = code >> (kBits - 1) & 1;
  const uint32_t biased = exponent ? exponent + (127 - kTopExponent<kBits>) : 0;
  return bit_cast<float>(biased << 23 | sign << 31);
}

// Two codes become one that stands for their sum on average: Global-QSGD (arXiv 2305.18627), the
// reduction of exponential dithering. With levels A >= B = 2^-d A, the sum of the same sign lies
// between A and 2A, and goes up with probability 2^-d; the difference lies between A/2 and A, and
// goes down with probability 2^(1-d). Levels must have room for 2A: see CodeArgs::headroom. A level
// below 2^-31 of the other one is lost, as 32 bits of dither cannot tell it from none.
template <int kBits>
GQSGD_INLINE uint32_t exponential_sum(uint32_t a, uint32_t b, uint32_t dither) {
  constexpr uint32_t kTop = kTopExponent<kBits>;
  const uint32_t exponent_a = a & kTop, exponent_b = b & kTop;
  const bool a_is_larger = exponent_a > exponent_b;
  const uint32_t large = a_is_larger ? exponent_a : exponent_b;
  const uint32_t small = a_is_larger ? exponent_b : exponent_a;
  const uint32_t sign = (a_is_larger ? a : b) & (kTop + 1);
  const uint32_t apart = large - small;
  const bool same_sign = ((a ^ b) & (kTop + 1)) == 0;
  // True with probability 2^-m: for a dither below 2^(32-m).
  const uint32_t m = same_sign ? apart : apart - 1;
  const bool move = m < 32 && (dither >> (31 - (m & 31)) >> 1) == 0;
  const uint32_t up = large < kTop ? large + 1 : kTop;
  const uint32_t sum = same_sign ? (move ? up : large) : (move ? large - 1 : large);
  const uint32_t both = !same_sign && apart == 0 ? 0 : sum | sign;
  return small == 0 ? (large ? large | sign : 0) : both;
}

// A code that ranks have combined theirs to, back in the units of the gradient.
template <class Real, int kWidth>
struct ExponentialSum {
  static constexpr bool kAdded = false;
  int bits = kWidth;
  Real factor;

  GQSGD_MEMBER ExponentialSum(const CodeArgs& args, int64_t, double scale)
      : factor(static_cast<Real>(scale * power_of_two(args.headroom))) {}
  GQSGD_MEMBER bool is_signed(bool) const { return false; }
  template <class Word>
  GQSGD_MEMBER Real decode_signed(Word word, int shift, Real norm) const {
    return decode_biased(word, shift, norm);
  }
  template <class Word>
  GQSGD_MEMBER Real decode_biased(Word word, int shift, Real norm) const {
    const Real level = exponential_level<kWidth>(static_cast<uint32_t>(word >> shift));
    return (level * factor) * norm;
  }
};

// One rank's codes; see codes.h. Those of a width have all of its levels.
template <class Real, int kWidth>
struct ExponentialCode {
  static constexpr const char* kName = "exponential";
  static constexpr const char* kWidths = "4 or 8";
  static constexpr int kBits = kWidth;
  using Sum = Real;
  using Sums = ExponentialSum<Real, kWidth>;
  int bits = kWidth;
  float share;

  GQSGD_INLINE LevelRange levels_at(int bits) {
    const int32_t all = bits == kWidth ? kTopExponent<kWidth> : 0;
    return {all, all};
  }
  // Each rank but the first may double the largest sum, and one level must be left.
  GQSGD_INLINE int64_t most_ranks(int, int32_t levels) { return levels; }
  GQSGD_MEMBER explicit ExponentialCode(const CodeArgs& args)
      : share(power_of_two(-args.headroom)) {}
  GQSGD_MEMBER uint64_t bias() const { return 0; }
  GQSGD_MEMBER Grid<Real> grid(Real norm) const { return make_grid(norm, 1, 0); }
  GQSGD_MEMBER int32_t encode(Real x, Grid<Real> grid, uint32_t dither) const {
    const float place = static_cast<float>((x * grid.pre) * grid.scale);
    return static_cast<int32_t>(exponential_code<kWidth>(place * share, dither));
  }
  GQSGD_MEMBER uint32_t drawn(uint32_t dither) const { return dither; }
  template <class Word>
  GQSGD_MEMBER Sum decode(Word word, int shift, bool) const {
    return exponential_level<kWidth>(static_cast<uint32_t>(word >> shift));
  }
  GQSGD_MEMBER double ratio(double factor) const { return factor; }
};

}  // namespace gqsgd
