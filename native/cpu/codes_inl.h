// Codes to lanes and back, a tile at a time. Included by kernels_inl.h alone.
#pragma once

#include "core/codes.h"
#include "core/hash.h"
#include "kernels.h"

namespace gqsgd {
namespace {

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

template <class T, class Word, class Sums>
void dequantize(const CodeArgs& args, const Sums sums, const Word* words, T* out, int64_t begin,
                int64_t end) {
  using Real = typename Traits<T>::Real;
  const Layout layout{args.numel, args.block, lanes_per_word(args.bits)};

  decode_tiles(args, layout, out, begin, end, [&](int64_t, const Layout::Tile& tile, Real norm) {
    const Word* __restrict in = words + tile.word;
    for_each_lane(tile.size, tile.words, layout.lanes, args.bits,
                  [&](int64_t first, int64_t count, int shift, bool top) {
                    T* __restrict to = out + tile.begin + first;
                    if (sums.is_signed(top)) {
                      for (int64_t j = 0; j < count; ++j) {
                        store(to + j, sums.decode_signed(in[j], shift, norm));
                      }
                    } else {
                      for (int64_t j = 0; j < count; ++j) {
                        store(to + j, sums.decode_biased(in[j], shift, norm));
                      }
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
