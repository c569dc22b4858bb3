// Linear dithering with s levels a side: an element x of a block with global norm M becomes the
// code c = floor(x * s / M + xi), -s <= c <= s, and n summed codes become sum(c) * M / (s * n).
// Global-QSGD (arXiv 2305.18627), the standard dithering with the infinity norm per block.
//
// The grid is in fixed point: x * s / M is taken to `fraction` binary places by one multiplication,
// and the dither is added as an integer. Nothing is added in floating point, so there is nothing
// that a compiler could fuse and every device and instruction set gives the same code; and neither
// zero nor the maximum is ever moved by the dither.
#pragma once

#include "core/args.h"
#include "core/config.h"
#include "core/lanes.h"

namespace gqsgd {

// As many binary places as an int32 holds beside the most levels that a lane has: 16 at 16 bits.
GQSGD_INLINE int fraction_bits(int bits) { return 32 - bits; }

// How the elements of one block go to the grid: grid = (x * pre) * scale. `pre` is a power of two
// (so that product is exact) and keeps the quotient in range from subnormal to largest norms.
template <class Real>
struct Grid {
  Real pre;
  Real scale;
};

GQSGD_INLINE float exponent_guard(float) { return 0x1p64f; }
GQSGD_INLINE double exponent_guard(double) { return 0x1p512; }

// The next number above a positive one.
GQSGD_INLINE float next_up(float x) { return bit_cast<float>(bit_cast<int32_t>(x) + 1); }
GQSGD_INLINE double next_up(double x) { return bit_cast<double>(bit_cast<int64_t>(x) + 1); }

// A norm of zero gives the grid that takes all to zero; the norm must be finite.
template <class Real>
GQSGD_INLINE Grid<Real> make_grid(Real norm, int32_t levels, int fraction) {
  const Real guard = exponent_guard(norm);
  const Real pre = norm < 1 / guard ? guard : norm > guard ? 1 / guard : Real(1);
  const Real one = static_cast<Real>(int64_t{levels} << fraction);
  if (!(norm > 0)) return {pre, Real(0)};
  // Where M * (s / M) falls short of s by a rounding error, the dither could move the maximum.
  const Real scale = one / (norm * pre);
  return {pre, (norm * pre) * scale < one ? next_up(scale) : scale};
}

// The code of one element, from -levels to levels. `dither` is uniform on 32 bits.
template <class Real>
GQSGD_INLINE int32_t quantize_element(Real x, Grid<Real> grid, int32_t levels, int fraction,
                                      uint32_t dither) {
  const Real limit = static_cast<Real>(int64_t{levels} << fraction);
  Real place = (x * grid.pre) * grid.scale;
  // The quotient may pass s by a rounding error; the sum of codes must not. These comparisons take
  // a NaN, which only an element that changed after its norm was taken can give, to -s.
  place = place > -limit ? place : -limit;
  place = place < limit ? place : limit;
  const int32_t fixed = static_cast<int32_t>(place);
  return (fixed + static_cast<int32_t>(dither >> (32 - fraction))) >> fraction;
}

// The dither that rounds to nearest, halves up: floor(x * s / M + 1/2).
constexpr uint32_t kHalf = uint32_t{1} << 31;

// A sum of codes, back in the units of the gradient. `ratio` is the wanted factor (1/n for the
// mean) over the levels; it is applied before the norm, so that a subnormal norm loses nothing.
template <class Real>
GQSGD_INLINE Real dequantize_element(int32_t code_sum, Real ratio, Real norm) {
  return (static_cast<Real>(code_sum) * ratio) * norm;
}

// The sums over `contributors` ranks of their codes, added in their lanes, back in the units of the
// gradient.
template <class Real>
struct LinearSums {
  static constexpr bool kAdded = true;
  int bits;
  int32_t bias;
  Real factor;
  bool unsigned_words;

  GQSGD_MEMBER LinearSums(const CodeArgs& args, int64_t contributors, double scale)
      : bits(args.bits),
        bias(static_cast<int32_t>(contributors * args.levels)),
        factor(static_cast<Real>(scale / args.levels)),
        unsigned_words(args.unsigned_words) {}
  // The top lane of a signed word is signed, and has no bias.
  GQSGD_MEMBER bool is_signed(bool top) const { return top && !unsigned_words; }
  template <class Word>
  GQSGD_MEMBER Real decode_signed(Word word, int shift, Real norm) const {
    const SignedOf<Word> sum = static_cast<SignedOf<Word>>(word) >> shift;
    return dequantize_element(static_cast<int32_t>(sum), factor, norm);
  }
  template <class Word>
  GQSGD_MEMBER Real decode_biased(Word word, int shift, Real norm) const {
    const Word sum = (word >> shift) & ((Word{1} << bits) - 1);
    return dequantize_element(static_cast<int32_t>(sum) - bias, factor, norm);
  }
};

// One rank's codes; see codes.h.
template <class Real>
struct LinearCode {
  static constexpr const char* kName = "linear";
  static constexpr const char* kWidths = "from 2 to 16";
  static constexpr int kBits = 0;
  using Sum = int32_t;
  using Sums = LinearSums<Real>;
  int bits;
  int32_t levels;
  bool unsigned_words;
  bool nearest;

  GQSGD_INLINE LevelRange levels_at(int bits) { return {1, ((1 << bits) - 1) / 2}; }
  GQSGD_INLINE int64_t most_ranks(int bits, int32_t levels) {
    return ((1 << bits) - 1) / (2 * levels);
  }
  GQSGD_MEMBER explicit LinearCode(const CodeArgs& args)
      : bits(args.bits),
        levels(args.levels),
        unsigned_words(args.unsigned_words),
        nearest(args.kind == CodeKind::kNearest) {}
  GQSGD_MEMBER uint64_t bias() const { return lane_bias(bits, levels, unsigned_words); }
  GQSGD_MEMBER Grid<Real> grid(Real norm) const {
    return make_grid(norm, levels, fraction_bits(bits));
  }
  GQSGD_MEMBER int32_t encode(Real x, Grid<Real> grid, uint32_t dither) const {
    return quantize_element(x, grid, levels, fraction_bits(bits), dither);
  }
  // What to encode with, given the dither of an element.
  GQSGD_MEMBER uint32_t drawn(uint32_t dither) const { return nearest ? kHalf : dither; }
  // No more than the bits of a code count, whatever a word from another rank has above them: sums
  // of what this gives must not overflow.
  template <class Word>
  GQSGD_MEMBER Sum decode(Word word, int shift, bool top) const {
    const uint32_t lane = static_cast<uint32_t>(word >> shift) << (32 - bits);
    return top ? static_cast<Sum>(lane) >> (32 - bits)
               : static_cast<Sum>(lane >> (32 - bits)) - levels;
  }
  GQSGD_MEMBER double ratio(double factor) const { return factor / levels; }
};

// The same, for loops that drawn() would keep from being vectorized.
template <class Real>
struct NearestCode : LinearCode<Real> {
  GQSGD_MEMBER explicit NearestCode(const LinearCode<Real>& code) : LinearCode<Real>(code) {}
  GQSGD_MEMBER int32_t encode(Real x, Grid<Real> grid, uint32_t) const {
    return LinearCode<Real>::encode(x, grid, kHalf);
  }
};

// f(code), of the type that rounds as the code says.
template <class Code, class F>
GQSGD_INLINE void with_rounding(const Code& code, F f) {
  f(code);
}
template <class Real, class F>
GQSGD_INLINE void with_rounding(const LinearCode<Real>& code, F f) {
  if (code.nearest) {
    f(NearestCode<Real>(code));
  } else {
    f(code);
  }
}

}  // namespace gqsgd
