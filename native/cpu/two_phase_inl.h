// The middle and the end of a two-phase exchange: a rank averages the tiles that it owns, rounds
// the means once more, and all ranks decode them. A reduce-scatter ends with the first of these:
// the owner keeps the sum as it is. Included by kernels_inl.h alone.
//
// A mean is kept as a share of the tile's global norm M, from -1 to 1, and rounded on the norm R of
// these shares. So neither the smallest nor the largest M costs any precision: M comes in at the
// very end, in (code * ratio * R) * M.
#pragma once

#include "codes_inl.h"

namespace gqsgd {
namespace {

template <class Real, class Word>
MeansLayout means_layout(const Layout& layout) {
  using Norm = decltype(bits_of(Real{}));
  const int64_t unit = sizeof(Norm) > sizeof(Word) ? sizeof(Norm) : sizeof(Word);
  return {layout, sizeof(Word), unit};
}

// Adds one rank's codes of a tile. kBits: the lane width as a constant, which makes shifts faster;
// 0: that of the code.
template <int kBits, class Word, class Code>
GQSGD_INLINE void add_codes(const Word* __restrict in, const Layout::Tile& tile, int64_t lanes,
                            Code code, typename Code::Sum* __restrict sum) {
  if (kBits) code.bits = kBits;
  for_each_lane(tile.size, tile.words, lanes, code.bits,
                [&](int64_t first, int64_t count, int shift, bool top) {
                  typename Code::Sum* __restrict to = sum + first;
                  if (top) {
                    for (int64_t j = 0; j < count; ++j) to[j] += code.decode(in[j], shift, true);
                  } else {
                    for (int64_t j = 0; j < count; ++j) to[j] += code.decode(in[j], shift, false);
                  }
                });
}

// Adds all ranks' codes of a tile, in the order of the ranks: sums of exponential levels are
// rounded. What was received begins with the word `first_word`.
template <class Word, class Code>
GQSGD_INLINE void sum_tile(const Received& received, const Layout::Tile& tile, int64_t first_word,
                           int64_t lanes, const Code& code, typename Code::Sum* __restrict sum) {
  for (int64_t i = 0; i < tile.size; ++i) sum[i] = 0;
  for (int64_t rank = 0; rank < received.ranks; ++rank) {
    const Word* __restrict in = static_cast<const Word*>(received.words) + rank * received.stride +
                                (tile.word - first_word);
    if (sizeof(Word) == 4 && code.bits == 8) {
      add_codes<8>(in, tile, lanes, code, sum);
    } else {
      add_codes<0>(in, tile, lanes, code, sum);
    }
  }
}

template <class T, class Word, class Code>
void sum_codes(const CodeArgs& args, const Code code, const Received& received, double scale,
               T* out, int64_t begin, int64_t end) {
  using Real = typename Traits<T>::Real;
  const Layout layout{args.numel, args.block, lanes_per_word(args.bits)};
  const Real ratio = static_cast<Real>(code.ratio(scale));

  decode_tiles(args, layout, out, begin, end,
               [&](int64_t, const Layout::Tile& tile, Real norm, bool streamed) {
                 alignas(kLine) typename Code::Sum sum[kTile];
                 sum_tile<Word>(received, tile, 0, layout.lanes, code, sum);
                 const typename Code::Sum* __restrict from = sum;
                 store_run(out + tile.begin, tile.size, streamed,
                           [=](int64_t j) { return (static_cast<Real>(from[j]) * ratio) * norm; });
               });
}

template <class Real, class Word, class Code>
void requantize(const CodeArgs& args, const Code code, const Received& received, uint64_t key,
                unsigned char* means, int64_t first_tile, int64_t begin, int64_t end) {
  using Norm = decltype(bits_of(Real{}));
  const Layout layout{args.numel, args.block, lanes_per_word(args.bits)};
  const MeansLayout at = means_layout<Real, Word>(layout);
  const int64_t first_word = layout.word(first_tile), first_unit = at.begin(first_tile);
  const Real ratio = static_cast<Real>(code.ratio(1.0 / static_cast<double>(received.ranks)));

  for (int64_t t = begin; t < end; ++t) {
    const Layout::Tile tile = layout.tile(t);
    unsigned char* record = means + (at.begin(t) - first_unit) * at.unit;
    memset(record, 0, static_cast<size_t>(at.units_of_tile(tile.size) * at.unit));
    if (!is_finite_norm(static_cast<const Norm*>(args.norms)[tile.block])) continue;

    typename Code::Sum sum[kTile];
    sum_tile<Word>(received, tile, first_word, layout.lanes, code, sum);
    Real mean[kTile];
    Norm largest = 0;
    for (int64_t i = 0; i < tile.size; ++i) {
      mean[i] = static_cast<Real>(sum[i]) * ratio;
      const Norm bits = magnitude(mean[i]);
      largest = bits > largest ? bits : largest;
    }
    memcpy(record, &largest, sizeof(largest));
    Word* words = reinterpret_cast<Word*>(record + at.unit);
    encode_tile(mean, tile, layout.lanes, code, code.grid(bit_cast<Real>(largest)),
                tile_key(key, static_cast<uint64_t>(t)), 0, words);
  }
}

template <class T, class Word, class Code>
void dequantize_means(const CodeArgs& args, const Code code, const unsigned char* means,
                      double scale, T* out, int64_t first_tile, int64_t begin, int64_t end) {
  using Real = typename Traits<T>::Real;
  using Norm = typename Traits<T>::Norm;
  const Layout layout{args.numel, args.block, lanes_per_word(args.bits)};
  const MeansLayout at = means_layout<Real, Word>(layout);
  const int64_t first_unit = at.begin(first_tile);
  const Real ratio = static_cast<Real>(code.ratio(scale));

  decode_tiles(args, layout, out, begin, end,
               [&](int64_t t, const Layout::Tile& tile, Real norm, bool streamed) {
                 const unsigned char* record = means + (at.begin(t) - first_unit) * at.unit;
                 Norm share_bits;
                 memcpy(&share_bits, record, sizeof(share_bits));
                 const Real share = bit_cast<Real>(share_bits);
                 const Word* __restrict in = reinterpret_cast<const Word*>(record + at.unit);
                 for_each_lane(
                     tile.size, tile.words, layout.lanes, args.bits,
                     [&](int64_t first, int64_t count, int shift, bool top) {
                       store_run(out + tile.begin + first, count, streamed, [=](int64_t j) {
                         const Real c = static_cast<Real>(code.decode(in[j], shift, top));
                         return ((c * ratio) * share) * norm;
                       });
                     });
               });
}

}  // namespace
}  // namespace gqsgd
