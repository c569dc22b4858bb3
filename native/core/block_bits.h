// A width for each block: linear codes whose width follows the block's global norm M,
//     w = round(c + power * log2 M), at least `least` and at most `most` bits,
// with the largest c that fits a number of words. All of it is integers, from the bits of the
// reduced norms alone, so that every rank and device comes to the same widths, and none depends on
// the dither. A block whose norm is zero or not finite takes no bits: its elements are known.
//
// A block of m elements has q = ceil(m / 32) columns: row i of column j is element i * q + j. The
// 32 codes of a column, of w bits each, fill w words one after the other; word k of column j is
// word k * q + j of the block. So loops run over consecutive elements and words whatever the width
// is.
//
// Codes that ranks add must not straddle words. They lie in lanes of 64-bit words as lanes.h has
// them, each word in the place of two: L = floor(64 / w) lanes, and lane l of word j holds element
// l * ceil(32 q / L) + j.
#pragma once

#include "core/args.h"
#include "core/dtypes.h"
#include "core/lanes.h"
#include "core/linear.h"

namespace gqsgd {

constexpr int kRows = 32;
GQSGD_INLINE int32_t columns_of(int64_t elements) {
  return static_cast<int32_t>(ceil_div(elements, kRows));
}

// A block is one tile, of no more columns than that.
constexpr int32_t kMostColumns = static_cast<int32_t>(kTile / kRows);

// Codes that are added, and the lanes of a 64-bit word that has such codes.
GQSGD_INLINE bool is_added(int32_t summands) { return summands > 1; }
GQSGD_INLINE int32_t lanes_of_pair(int32_t width) { return 64 / width; }

// Levels a side of codes of which `summands` are added; 0 where the lanes are too narrow.
GQSGD_INLINE int32_t block_levels(int32_t width, int32_t summands) {
  return ((1 << width) - 1) / (2 * summands);
}

// 64-bit words of a block whose codes are added.
GQSGD_INLINE int32_t pairs_of(int32_t columns, int32_t width) {
  const int32_t lanes = lanes_of_pair(width);
  return (kRows * columns + lanes - 1) / lanes;
}
// Lanes of a block, those included that no element has.
GQSGD_INLINE int32_t lanes_of(int32_t columns, int32_t width, int32_t summands) {
  if (!is_added(summands) || width == 0) return kRows * columns;
  return pairs_of(columns, width) * lanes_of_pair(width);
}
// The most of them: the last word of 2-bit lanes may have 31 that no element has.
constexpr int32_t kMostLanes = static_cast<int32_t>(kTile) + 32;

// 32-bit words of a block.
GQSGD_INLINE int32_t block_words(int32_t columns, int32_t width, int32_t summands) {
  return is_added(summands) && width ? 2 * pairs_of(columns, width) : columns * width;
}

// `power` in units of 2^-8, from 0 to 2; widths from 2 to 16, which leave a level to so many codes
// that are added.
struct WidthRule {
  int32_t power;
  int32_t least, most;
  int32_t summands;
};
constexpr int kMostPower = 2 << 8;

// What a norm adds to the width, in units of 2^-8 bits: power * log2 M, with a log2 that is linear
// between powers of two. It never falls where the norm rises.
constexpr int kWeightPlaces = 8;
constexpr int32_t kNoWeight = -(1 << 30);  // no bits at all

GQSGD_INLINE int32_t norm_log2(int32_t norm) {
  return (norm >> (23 - kWeightPlaces)) - (127 << kWeightPlaces);
}
GQSGD_INLINE int32_t norm_log2(int64_t norm) {
  return static_cast<int32_t>(norm >> (52 - kWeightPlaces)) - (1023 << kWeightPlaces);
}
template <class Norm>
GQSGD_INLINE int32_t block_weight(Norm norm, int32_t power) {
  const int32_t weight = (norm_log2(norm) * power) >> 8;
  return norm > 0 && is_finite_norm(norm) ? weight : kNoWeight;
}

// The width of a block at an offset c, in units as those of weights.
GQSGD_INLINE int32_t width_at(int32_t weight, int32_t offset, const WidthRule& rule) {
  const int32_t wanted = (offset + weight + (1 << (kWeightPlaces - 1))) >> kWeightPlaces;
  const int32_t wide = wanted > rule.least ? wanted : rule.least;
  const int32_t width = wide < rule.most ? wide : rule.most;
  return weight == kNoWeight ? 0 : width;
}

// The widest lanes, up to `most` bits, of which as many fit a word: 12 bits for 11.
GQSGD_INLINE int32_t widened(int32_t width, const WidthRule& rule) {
  if (!is_added(rule.summands) || width == 0) return width;
  const int32_t wide = 64 / lanes_of_pair(width);
  return wide < rule.most ? wide : rule.most;
}

// The largest offset at which blocks take no more than `capacity` words, which is enough for the
// least width of all; with the smallest and the largest weight, and words(offset) in total. Beyond
// the offset where all blocks have the most bits there is none.
template <class F>
GQSGD_INLINE int32_t best_offset(int32_t smallest, int32_t largest, const WidthRule& rule,
                                 int64_t capacity, F words) {
  int32_t fits = ((rule.least - 1) << kWeightPlaces) - largest;
  int32_t beyond = ((rule.most + 1) << kWeightPlaces) - smallest + 1;
  while (beyond - fits > 1) {
    const int32_t middle = fits + (beyond - fits) / 2;
    (words(middle) <= capacity ? fits : beyond) = middle;
  }
  return fits;
}

// The widths of blocks, and where their words begin in a message; with `starts` one longer.
struct BlockPlan {
  const int32_t* widths;
  const int32_t* starts;
  int64_t begin, end;        // of the words that there are
  int32_t summands = 1;      // codes that lanes have room for
  int32_t contributors = 1;  // codes that lanes are the sum of

  struct Place {
    int32_t width;
    int64_t start;   // of the block's words, from `begin` on
    int64_t words;   // of the block
    int64_t unused;  // words after them that no block has
  };
  // A plan that does not fit the words gives no bits: no kernel leaves its buffers.
  GQSGD_MEMBER Place place(int64_t block, int32_t columns) const {
    const int64_t start = starts[block], next = starts[block + 1];
    const int32_t width = widths[block];
    const bool inside = begin <= start && start <= next && next <= end;
    const bool known = inside && 2 <= width && width <= 16 && block_levels(width, summands) > 0;
    const bool even = !is_added(summands) || (start - begin) % 2 == 0;
    const bool fits = known && even && block_words(columns, width, summands) <= next - start;
    const int32_t taken = fits ? width : 0, words = block_words(columns, taken, summands);
    return {taken, start - begin, words, inside ? next - start - words : 0};
  }
};

// The code of a block's elements at its width, in lanes with s added; for a block without a width
// one that has a level.
template <class Real>
GQSGD_INLINE LinearCode<Real> block_code(int32_t width, int32_t summands = 1,
                                         CodeKind kind = CodeKind::kLinear) {
  CodeArgs args{};
  args.kind = kind;
  args.bits = width ? width : 2;
  const int32_t levels = block_levels(args.bits, summands);
  args.levels = levels ? levels : 1;
  return LinearCode<Real>(args);
}

// Word k of column j, from lanes in the order of the elements.
template <class Lane>
GQSGD_INLINE uint32_t packed_word(const Lane* lanes, int32_t columns, int32_t k, int32_t j,
                                  int32_t width) {
  uint32_t word = 0;
  for (int32_t i = 32 * k / width; i < kRows && i * width < 32 * (k + 1); ++i) {
    const uint32_t lane = lanes[i * columns + j];
    const int32_t shift = i * width - 32 * k;
    word |= shift >= 0 ? lane << shift : lane >> -shift;
  }
  return word;
}

// The lane of row i of column j.
GQSGD_INLINE uint32_t unpacked_lane(const uint32_t* words, int32_t columns, int32_t i, int32_t j,
                                    int32_t width) {
  const int32_t k = i * width / 32, shift = i * width % 32;
  uint32_t lane = words[k * columns + j] >> shift;
  if (shift + width > 32) lane |= words[(k + 1) * columns + j] << (32 - shift);
  return lane & ((1u << width) - 1);
}

// The bias that the top lane of a word of added codes lacks, as that lane is signed (lanes.h).
GQSGD_INLINE uint64_t top_bias(int32_t bias, int32_t width) {
  return static_cast<uint64_t>(static_cast<uint32_t>(bias)) << (width * (lanes_of_pair(width) - 1));
}

// Word j of `pairs` of added codes, from lanes in the order of the elements, with s added.
template <class Lane>
GQSGD_INLINE uint64_t packed_pair(const Lane* lanes, int32_t pairs, int32_t j, int32_t width,
                                  int32_t levels) {
  uint64_t word = 0;
  for (int32_t i = 0; i < lanes_of_pair(width); ++i) {
    word |= uint64_t{static_cast<uint32_t>(lanes[i * pairs + j])} << (i * width);
  }
  return word - top_bias(levels, width);
}

// Lane i of such a word that is the sum of codes with `bias` in all.
GQSGD_INLINE uint32_t unpacked_pair(uint64_t word, int32_t i, int32_t width, int32_t bias) {
  const uint64_t lanes = word + top_bias(bias, width);
  return static_cast<uint32_t>(lanes >> (i * width)) & ((1u << width) - 1);
}

}  // namespace gqsgd
