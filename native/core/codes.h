// The codes as the loops over tensors see them: from an element to what a lane holds, and back. And
// the way from the types that are known at run time to those of templates.
#pragma once

#include "core/args.h"
#include "core/dtypes.h"
#include "core/exponential.h"
#include "core/lanes.h"
#include "core/linear.h"

namespace gqsgd {

// The two ditherings: `grid` for a norm, `encode` for one element, `decode` for the contents of one
// lane that holds a single rank's code. A sum of n decoded codes times ratio(n) is a mean, as a
// share of the norm.
template <class Real>
struct LinearCode {
  using Sum = int32_t;
  int bits;
  int32_t levels;
  int fraction;
  bool unsigned_words;

  GQSGD_MEMBER explicit LinearCode(const CodeArgs& args)
      : bits(args.bits),
        levels(args.levels),
        fraction(fraction_bits(args.levels)),
        unsigned_words(args.unsigned_words) {}
  GQSGD_MEMBER uint64_t bias() const { return lane_bias(bits, levels, unsigned_words); }
  GQSGD_MEMBER Grid<Real> grid(Real norm) const { return make_grid(norm, levels, fraction); }
  GQSGD_MEMBER int32_t encode(Real x, Grid<Real> grid, uint32_t dither) const {
    return quantize_element(x, grid, levels, fraction, dither);
  }
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

template <class Real, int kBits>
struct ExponentialCode {
  using Sum = Real;
  int bits = kBits;
  float share;

  GQSGD_MEMBER explicit ExponentialCode(const CodeArgs& args)
      : share(power_of_two(-args.headroom)) {}
  GQSGD_MEMBER uint64_t bias() const { return 0; }
  GQSGD_MEMBER Grid<Real> grid(Real norm) const { return make_grid(norm, 1, 0); }
  GQSGD_MEMBER int32_t encode(Real x, Grid<Real> grid, uint32_t dither) const {
    const float place = static_cast<float>((x * grid.pre) * grid.scale);
    return static_cast<int32_t>(exponential_code<kBits>(place * share, dither));
  }
  template <class Word>
  GQSGD_MEMBER Sum decode(Word word, int shift, bool) const {
    return exponential_level<kBits>(static_cast<uint32_t>(word >> shift));
  }
  GQSGD_MEMBER double ratio(double factor) const { return factor; }
};

// What ranks have made of their codes together, back in the units of the gradient: the linear codes
// of `contributors` ranks, added up in their lanes...
template <class Real>
struct LinearSums {
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

// ... or their exponential codes, combined to one.
template <class Real, int kBits>
struct ExponentialSum {
  int bits = kBits;
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
    const Real level = exponential_level<kBits>(static_cast<uint32_t>(word >> shift));
    return (level * factor) * norm;
  }
};

// From run time to templates: f gets a value of the type in question. Local to each source file, as
// the CPU kernels are compiled once for each instruction set.
namespace {

template <class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat64:
      return f(double{});
    case DType::kFloat16:
      return f(Half{});
    case DType::kBFloat16:
      return f(BFloat16{});
  }
}

// The arithmetic type alone.
template <class F>
void with_real(DType dtype, F f) {
  if (dtype == DType::kFloat64) {
    f(double{});
  } else {
    f(float{});
  }
}

// The type of the words that lanes are packed in.
template <class F>
void with_word(int bits, F f) {
  if (fits_int32(bits)) {
    f(uint32_t{});
  } else {
    f(uint64_t{});
  }
}

// f(code, word)
template <class Real, class F>
void with_code(const CodeArgs& args, F f) {
  if (args.levels > 0) {
    with_word(args.bits, [&](auto word) { f(LinearCode<Real>(args), word); });
  } else if (args.bits == 8) {
    f(ExponentialCode<Real, 8>(args), uint32_t{});
  } else {
    f(ExponentialCode<Real, 4>(args), uint32_t{});
  }
}

// f(sums, word)
template <class Real, class F>
void with_sums(const CodeArgs& args, int64_t contributors, double scale, F f) {
  if (args.levels > 0) {
    with_word(args.bits, [&](auto word) { f(LinearSums<Real>(args, contributors, scale), word); });
  } else if (args.bits == 8) {
    f(ExponentialSum<Real, 8>(args, contributors, scale), uint32_t{});
  } else {
    f(ExponentialSum<Real, 4>(args, contributors, scale), uint32_t{});
  }
}

}  // namespace
}  // namespace gqsgd
