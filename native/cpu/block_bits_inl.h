// Blocks of different widths; see core/block_bits.h. Included by kernels_inl.h alone.
#pragma once

#include "block_lanes_inl.h"
#include "codes_inl.h"
#include "core/block_bits.h"

namespace gqsgd {
namespace {

// The words of blocks of all numbers of columns, at all widths, whose codes are added.
struct AddedWords {
  int16_t words[kMostColumns + 1][17];

  explicit AddedWords(const WidthRule& rule) {
    for (int32_t columns = 0; columns <= kMostColumns; ++columns) {
      for (int32_t width = 0; width <= 16; ++width) {
        const int32_t wide = width < 2 ? 0 : widened(width, rule);
        words[columns][width] =
            static_cast<int16_t>(wide ? block_words(columns, wide, rule.summands) : 0);
      }
    }
  }
};

// The words of all blocks at an offset.
GQSGD_INLINE int64_t words_at(int32_t offset, const int32_t* __restrict weights,
                              const uint8_t* __restrict columns, int64_t blocks, WidthRule rule,
                              const AddedWords& added) {
  constexpr int64_t kRun = 4096;  // sums of so many fit 32 bits
  int64_t total = 0;
  if (is_added(rule.summands)) {
    for (int64_t b = 0; b < blocks; ++b) {
      total += added.words[columns[b]][width_at(weights[b], offset, rule)];
    }
    return total;
  }
  for (int64_t first = 0; first < blocks; first += kRun) {
    const int64_t last = first + kRun < blocks ? first + kRun : blocks;
    int32_t sum = 0;
    for (int64_t b = first; b < last; ++b) sum += columns[b] * width_at(weights[b], offset, rule);
    total += sum;
  }
  return total;
}

template <class Norm>
void block_widths(const Norm* __restrict norms, const uint8_t* __restrict columns, int64_t blocks,
                  WidthRule rule, int64_t begin, int64_t end, int32_t* __restrict widths,
                  int32_t* __restrict starts) {
  // Until the end, `widths` has the weights.
  int32_t smallest = 0, largest = kNoWeight;
  for (int64_t b = 0; b < blocks; ++b) {
    const int32_t weight = block_weight(norms[b], rule.power);
    widths[b] = weight;
    smallest = weight < smallest && weight != kNoWeight ? weight : smallest;
    largest = weight > largest ? weight : largest;
  }
  if (largest == kNoWeight) largest = smallest;
  const AddedWords added(rule);
  const int32_t offset = best_offset(smallest, largest, rule, end - begin, [&](int32_t at) {
    return words_at(at, widths, columns, blocks, rule, added);
  });
  // What is left goes to the blocks that are the next to become wider, as far as it goes.
  int64_t left = end - begin - words_at(offset, widths, columns, blocks, rule, added), at = begin;
  for (int64_t b = 0; b < blocks; ++b) {
    const int32_t width = widened(width_at(widths[b], offset, rule), rule);
    const int32_t next = widened(width_at(widths[b], offset + 1, rule), rule);
    const int32_t words = block_words(columns[b], width, rule.summands);
    left -= block_words(columns[b], next, rule.summands) - words;
    widths[b] = left >= 0 ? next : width;
    starts[b] = static_cast<int32_t>(at);
    at += block_words(columns[b], widths[b], rule.summands);
  }
}

// Lanes in the order of the elements, of which those behind the last one have the code 0.
template <class T, class Code, class Grid>
GQSGD_INLINE void encode_block(const T* __restrict x, int64_t size, int64_t count, const Code& code,
                               Grid grid, uint64_t keyed, uint32_t offset,
                               uint32_t* __restrict lanes) {
  constexpr int kRun = 2 * kPair;
  int64_t first = 0;
  for (; first + kRun <= size; first += kRun) {
    const T* __restrict in = x + first;
    uint32_t* __restrict to = lanes + first;
    prefetch(in, kTile * int64_t{sizeof(T)}, kRun * int64_t{sizeof(T)});
    for (int j = 0; j < kPair; ++j) {
      const uint32_t bits =
          hash_bits(keyed, static_cast<uint32_t>(first) + static_cast<uint32_t>(j));
      const int32_t c = code.encode(load(in[j]), grid, bits + offset);
      const int32_t d = code.encode(load(in[j + kPair]), grid, second_of_pair(bits) + offset);
      to[j] = static_cast<uint32_t>(c + code.levels);
      to[j + kPair] = static_cast<uint32_t>(d + code.levels);
    }
  }
  for (; first < size; ++first) {
    const uint32_t drawn = dither_bits(keyed, static_cast<uint32_t>(first)) + offset;
    lanes[first] = static_cast<uint32_t>(code.encode(load(x[first]), grid, drawn) + code.levels);
  }
  for (; first < count; ++first) lanes[first] = code.levels;
}

GQSGD_INLINE void clear_words(uint32_t* words, int64_t count) {
  memset(words, 0, static_cast<size_t>(count) * sizeof(*words));
}

template <class T>
void quantize_blocks(const CodeArgs& args, const BlockPlan& plan, const T* x, uint64_t key,
                     uint32_t offset, uint32_t* words, int64_t begin, int64_t end) {
  using Real = typename Traits<T>::Real;
  const Layout layout{args.numel, args.block, 1};
  for (int64_t b = begin; b < end; ++b) {
    const Layout::Tile tile = layout.tile(b);
    const int32_t columns = columns_of(tile.size);
    const BlockPlan::Place place = plan.place(b, columns);
    uint32_t* out = words + place.start;
    if (place.width) {
      alignas(kLine) uint32_t lanes[kMostLanes];
      const auto norm = static_cast<const typename Traits<T>::Norm*>(args.norms)[b];
      const LinearCode<Real> code = block_code<Real>(place.width, plan.summands, args.kind);
      with_rounding(code, [&](const auto& own) {
        encode_block(x + tile.begin, tile.size, lanes_of(columns, place.width, plan.summands), own,
                     own.grid(bit_cast<Real>(norm)), tile_key(key, static_cast<uint64_t>(b)),
                     offset, lanes);
      });
      pack_block(lanes, columns, code, plan.summands, out);
    }
    if (place.unused) clear_words(out + place.words, place.unused);
  }
}

// Adds the codes of a block in all messages, with s taken off: as many as fill its lanes. Zeros
// where it has no bits.
template <class Code>
GQSGD_INLINE void sum_block(const BlockPlan& plan, const Received& received,
                            const BlockPlan::Place& place, int32_t columns, const Code& code,
                            uint32_t* __restrict sums) {
  const auto* in = static_cast<const uint32_t*>(received.words) + place.start;
  const int32_t width = place.width;
  if (width == 0) {
    memset(sums, 0, sizeof(*sums) * kRows * static_cast<size_t>(columns));
  } else if (is_added(plan.summands)) {
    with_width(width, [&](auto w) {
      unpack_pairs<decltype(w)::value>(reinterpret_cast<const uint64_t*>(in),
                                       pairs_of(columns, width), code.levels * plan.contributors,
                                       sums);
    });
  } else {
    add_block<true>(in, columns, width, static_cast<uint32_t>(code.levels * received.ranks), sums);
    for (int64_t rank = 1; rank < received.ranks; ++rank) {
      add_block<false>(in + rank * received.stride, columns, width, 0, sums);
    }
  }
}

template <class T>
void sum_blocks(const CodeArgs& args, const BlockPlan& plan, const Received& received, double scale,
                T* out, int64_t begin, int64_t end) {
  using Real = typename Traits<T>::Real;
  const Layout layout{args.numel, args.block, 1};
  decode_tiles(args, layout, out, begin, end,
               [&](int64_t b, const Layout::Tile& tile, Real norm, bool streamed) {
                 const int32_t columns = columns_of(tile.size);
                 const BlockPlan::Place place = plan.place(b, columns);
                 alignas(kLine) uint32_t sums[kMostLanes];
                 const LinearCode<Real> code = block_code<Real>(place.width, plan.summands);
                 sum_block(plan, received, place, columns, code, sums);
                 const Real ratio = static_cast<Real>(code.ratio(scale));
                 const uint32_t* __restrict from = sums;
                 store_run(out + tile.begin, tile.size, streamed, [=](int64_t j) {
                   return (static_cast<Real>(static_cast<int32_t>(from[j])) * ratio) * norm;
                 });
               });
}

template <class Real>
void requantize_blocks(const CodeArgs& args, const BlockPlan& plan, const Received& received,
                       uint64_t key, decltype(bits_of(Real{}))* shares, uint32_t* words,
                       int64_t first_block, int64_t begin, int64_t end) {
  using Norm = decltype(bits_of(Real{}));
  const Layout layout{args.numel, args.block, 1};
  for (int64_t b = begin; b < end; ++b) {
    const Layout::Tile tile = layout.tile(b);
    const int32_t columns = columns_of(tile.size);
    const BlockPlan::Place place = plan.place(b, columns);
    uint32_t* out = words + place.start;
    Norm largest = 0;
    if (place.width) {
      const LinearCode<Real> code = block_code<Real>(place.width);
      const Real ratio = static_cast<Real>(code.ratio(1.0 / static_cast<double>(received.ranks)));
      alignas(kLine) uint32_t sums[kTile];
      sum_block(plan, received, place, columns, code, sums);
      alignas(kLine) Real mean[kTile];
      for (int64_t i = 0; i < tile.size; ++i) {
        mean[i] = static_cast<Real>(static_cast<int32_t>(sums[i])) * ratio;
        const Norm bits = magnitude(mean[i]);
        largest = bits > largest ? bits : largest;
      }
      encode_block(mean, tile.size, int64_t{kRows} * columns, code,
                   code.grid(bit_cast<Real>(largest)), tile_key(key, static_cast<uint64_t>(b)), 0,
                   sums);
      pack_block(sums, columns, code, 1, out);
    }
    shares[b - first_block] = largest;
    if (place.unused) clear_words(out + place.words, place.unused);
  }
}

template <class T>
void dequantize_blocks(const CodeArgs& args, const BlockPlan& plan,
                       const typename Traits<T>::Norm* shares, const uint32_t* words, double scale,
                       T* out, int64_t first_block, int64_t begin, int64_t end) {
  using Real = typename Traits<T>::Real;
  const Layout layout{args.numel, args.block, 1};
  decode_tiles(args, layout, out, begin, end,
               [&](int64_t b, const Layout::Tile& tile, Real norm, bool streamed) {
                 const int32_t columns = columns_of(tile.size);
                 const BlockPlan::Place place = plan.place(b, columns);
                 alignas(kLine) uint32_t sums[kTile];
                 const LinearCode<Real> code = block_code<Real>(place.width);
                 sum_block(plan, {words, 1, 0}, place, columns, code, sums);
                 const Real ratio = static_cast<Real>(code.ratio(scale));
                 const Real share = place.width ? bit_cast<Real>(shares[b - first_block]) : Real(0);
                 const uint32_t* __restrict from = sums;
                 store_run(out + tile.begin, tile.size, streamed, [=](int64_t j) {
                   const Real c = static_cast<Real>(static_cast<int32_t>(from[j]));
                   return ((c * ratio) * share) * norm;
                 });
               });
}

}  // namespace
}  // namespace gqsgd
