// Codes to lanes and back, a tile at a time. Included by kernels_inl.h alone.
#pragma once

#include "gqsgd/dtypes.h"
#include "gqsgd/exponential.h"
#include "gqsgd/hash.h"
#include "gqsgd/lanes.h"
#include "gqsgd/linear.h"
#include "kernels.h"

namespace gqsgd {
namespace {

// The two ditherings, as the loops below see them: `grid` for a norm, `encode` for one element,
// `decode` for the contents of one lane that holds a single rank's code. A sum of n decoded codes
// times ratio(n) is a mean, as a share of the norm.
template <class Real>
struct LinearCode {
  using Sum = int32_t;
  int bits;
  int32_t levels;
  int fraction;
  bool unsigned_words;

  explicit LinearCode(const CodeArgs& args)
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
  double ratio(double factor) const { return factor / levels; }
};

template <class Real, int kBits>
struct ExponentialCode {
  using Sum = Real;
  float share;

  explicit ExponentialCode(const CodeArgs& args) : share(power_of_two(-args.headroom)) {}
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
  double ratio(double factor) const { return factor; }
};

// Every lane of a tile in turn: f(lane's first element, how many, shift, whether it is the top
// one).
template <class F>
GQSGD_INLINE void for_each_lane(int64_t size, int64_t words, int64_t lanes, int bits, F f) {
  for (int64_t lane = 0; lane * words < size; ++lane) {
    const int64_t first = lane * words, left = size - first;
    f(first, left < words ? left : words, static_cast<int>(lane) * bits, lane + 1 == lanes);
  }
}

template <class Real, class Word, class T, class Code>
GQSGD_INLINE void encode_tile(const T* __restrict x, const Layout::Tile& tile, int64_t lanes,
                              int bits, const Code& code, Grid<Real> grid, uint64_t keyed,
                              uint32_t offset, Word* __restrict out) {
  for_each_lane(
      tile.size, tile.words, lanes, bits, [&](int64_t first, int64_t count, int shift, bool) {
        const T* __restrict in = x + first;
        const uint32_t index = static_cast<uint32_t>(first);
        for (int32_t j = 0; j < static_cast<int32_t>(count); ++j) {
          const uint32_t dither = dither_bits(keyed, index + static_cast<uint32_t>(j)) + offset;
          const int32_t c = code.encode(load(in[j]), grid, dither);
          out[j] += static_cast<Word>(static_cast<int64_t>(c)) << shift;
        }
      });
}

template <class T, class Word, class Code>
void quantize(const CodeArgs& args, const Code code, const T* x, uint64_t key, uint32_t offset,
              Word* words, int64_t begin, int64_t end) {
  using Real = typename Traits<T>::Real;
  using Norm = typename Traits<T>::Norm;
  const Layout layout{args.numel, args.block, lanes_per_word(args.bits)};
  const Word bias = static_cast<Word>(code.bias());

  for (int64_t t = begin; t < end; ++t) {
    const Layout::Tile tile = layout.tile(t);
    const Norm norm = static_cast<const Norm*>(args.norms)[tile.block];
    Word* __restrict out = words + tile.word;
    for (int64_t j = 0; j < tile.words; ++j) out[j] = bias;
    if (!is_finite_norm(norm)) continue;  // codes mean nothing there: the block decodes to NaN
    encode_tile<Real>(x + tile.begin, tile, layout.lanes, args.bits, code,
                      code.grid(bit_cast<Real>(norm)), tile_key(key, static_cast<uint64_t>(t)),
                      offset, out);
  }
}

// f(number, tile, norm) for tiles [begin, end) whose norm is finite; the others decode to NaN.
template <class T, class F>
GQSGD_INLINE void decode_tiles(const CodeArgs& args, const Layout& layout, T* out, int64_t begin,
                               int64_t end, F f) {
  using Norm = typename Traits<T>::Norm;
  for (int64_t t = begin; t < end; ++t) {
    const Layout::Tile tile = layout.tile(t);
    const Norm norm = static_cast<const Norm*>(args.norms)[tile.block];
    if (is_finite_norm(norm)) {
      f(t, tile, bit_cast<typename Traits<T>::Real>(norm));
    } else {
      for (int64_t j = 0; j < tile.size; ++j) store(out + tile.begin + j, quiet_nan(norm));
    }
  }
}

template <class T, class Word>
void dequantize_sums(const CodeArgs& args, const Word* words, int64_t contributors, double scale,
                     T* out, int64_t begin, int64_t end) {
  using Real = typename Traits<T>::Real;
  using Signed = typename std::make_signed<Word>::type;
  const Layout layout{args.numel, args.block, lanes_per_word(args.bits)};
  const Word mask = (Word{1} << args.bits) - 1;
  const int32_t bias = static_cast<int32_t>(contributors * args.levels);
  const Real ratio = static_cast<Real>(scale / args.levels);

  decode_tiles(args, layout, out, begin, end, [&](int64_t, const Layout::Tile& tile, Real norm) {
    const Word* __restrict in = words + tile.word;
    for_each_lane(
        tile.size, tile.words, layout.lanes, args.bits,
        [&](int64_t first, int64_t count, int shift, bool top) {
          T* __restrict to = out + tile.begin + first;
          if (top && !args.unsigned_words) {  // it is signed and has no bias
            for (int64_t j = 0; j < count; ++j) {
              const int32_t code_sum = static_cast<int32_t>(static_cast<Signed>(in[j]) >> shift);
              store(to + j, dequantize_element(code_sum, ratio, norm));
            }
          } else {
            for (int64_t j = 0; j < count; ++j) {
              const int32_t code_sum = static_cast<int32_t>((in[j] >> shift) & mask) - bias;
              store(to + j, dequantize_element(code_sum, ratio, norm));
            }
          }
        });
  });
}

template <int kBits, class T>
void dequantize_combined(const CodeArgs& args, const uint32_t* words, double scale, T* out,
                         int64_t begin, int64_t end) {
  using Real = typename Traits<T>::Real;
  const Layout layout{args.numel, args.block, lanes_per_word(args.bits)};
  const Real ratio = static_cast<Real>(scale * power_of_two(args.headroom));

  decode_tiles(args, layout, out, begin, end, [&](int64_t, const Layout::Tile& tile, Real norm) {
    const uint32_t* __restrict in = words + tile.word;
    for_each_lane(tile.size, tile.words, layout.lanes, args.bits,
                  [&](int64_t first, int64_t count, int shift, bool) {
                    T* __restrict to = out + tile.begin + first;
                    for (int64_t j = 0; j < count; ++j) {
                      const Real level = exponential_level<kBits>(in[j] >> shift);
                      store(to + j, (level * ratio) * norm);
                    }
                  });
  });
}

// Bytes of a tile's words are numbered, whichever lanes they hold.
template <int kBits>
void combine(const uint8_t* __restrict from, uint8_t* __restrict to, uint64_t key, int64_t bytes) {
  constexpr uint32_t kMask = (1u << kBits) - 1;
  for (int64_t i = 0; i < bytes; ++i) {
    uint32_t sum = 0;
    for (int shift = 0; shift < 8; shift += kBits) {
      const uint32_t lane = static_cast<uint32_t>(i * 8 + shift) / kBits;
      const uint32_t dither = dither_bits(key, lane);
      const uint32_t a = from[i] >> shift & kMask, b = to[i] >> shift & kMask;
      sum |= exponential_sum<kBits>(a, b, dither) << shift;
    }
    to[i] = static_cast<uint8_t>(sum);
  }
}

}  // namespace
}  // namespace gqsgd
