// Blocks of different widths; see core/block_bits.h. Included by kernels_inl.h alone.
#pragma once

#include "codes_inl.h"
#include "core/block_bits.h"

namespace gqsgd {
namespace {

// Columns that are packed at once.
template <int kVector>
struct Vector {
  using Lanes = uint32_t __attribute__((vector_size(kVector * sizeof(uint32_t))));
};

// By reference: without AVX, how such a vector is returned is not the same everywhere.
template <class Lanes>
GQSGD_INLINE void load_lanes(const uint32_t* from, Lanes& lanes) {
  memcpy(&lanes, from, sizeof(lanes));
}

template <int kWidth, int kVector>
GQSGD_INLINE void pack_columns(const uint32_t* __restrict lanes, int32_t columns,
                               uint32_t* __restrict words) {
  using Lanes = typename Vector<kVector>::Lanes;
  for (int32_t j = 0; j < columns; j += kVector) {
    Lanes word = {};
#pragma GCC unroll 32
    for (int i = 0; i < kRows; ++i) {
      const int shift = i * kWidth % 32;
      Lanes lane;
      load_lanes(lanes + i * columns + j, lane);
      word |= lane << shift;
      if (shift + kWidth >= 32) {
        memcpy(words + i * kWidth / 32 * columns + j, &word, sizeof(word));
        word = shift + kWidth > 32 ? lane >> (32 - shift) : Lanes{};
      }
    }
  }
}

// The first message sets the sums, and takes `bias` off.
template <int kWidth, int kVector, bool kFirst>
GQSGD_INLINE void add_columns(const uint32_t* __restrict words, int32_t columns, uint32_t bias,
                              uint32_t* __restrict sums) {
  using Lanes = typename Vector<kVector>::Lanes;
  for (int32_t j = 0; j < columns; j += kVector) {
    Lanes word, sum;
    load_lanes(words + j, word);
#pragma GCC unroll 32
    for (int i = 0; i < kRows; ++i) {
      const int shift = i * kWidth % 32;
      Lanes lane = word >> shift;
      if (shift + kWidth >= 32 && i + 1 < kRows) {
        load_lanes(words + (i * kWidth / 32 + 1) * columns + j, word);
        if (shift + kWidth > 32) lane |= word << (32 - shift);
      }
      if (kFirst) {
        sum = (lane & ((1u << kWidth) - 1)) - bias;
      } else {
        load_lanes(sums + i * columns + j, sum);
        sum += lane & ((1u << kWidth) - 1);
      }
      memcpy(sums + i * columns + j, &sum, sizeof(sum));
    }
  }
}

// f(width as a constant)
template <class F>
GQSGD_INLINE void with_width(int32_t width, F f) {
#define GQSGD_WIDTH(w) \
  case w:              \
    return f(std::integral_constant<int, w>{});
  switch (width) {
    GQSGD_WIDTH(2)
    GQSGD_WIDTH(3)
    GQSGD_WIDTH(4)
    GQSGD_WIDTH(5)
    GQSGD_WIDTH(6)
    GQSGD_WIDTH(7)
    GQSGD_WIDTH(8)
    GQSGD_WIDTH(9)
    GQSGD_WIDTH(10)
    GQSGD_WIDTH(11)
    GQSGD_WIDTH(12)
    GQSGD_WIDTH(13)
    GQSGD_WIDTH(14)
    GQSGD_WIDTH(15)
    GQSGD_WIDTH(16)
  }
#undef GQSGD_WIDTH
}

// 64-bit words of added codes that are packed at once.
constexpr int kPairs = 4;
using Pairs = uint64_t __attribute__((vector_size(kPairs * sizeof(uint64_t))));
using PairLanes = uint32_t __attribute__((vector_size(kPairs * sizeof(uint32_t))));

// f(j, how many) for words from 0 on: `kPairs` at once, the last of them again where that takes it.
template <class F>
GQSGD_INLINE void for_pairs(int32_t pairs, F f) {
  if (pairs < kPairs) {
    for (int32_t j = 0; j < pairs; ++j) f(j, std::integral_constant<int, 1>{});
    return;
  }
  for (int32_t j = 0; j < pairs; j += kPairs) {
    f(j + kPairs <= pairs ? j : pairs - kPairs, std::integral_constant<int, kPairs>{});
  }
}

template <int kWidth>
GQSGD_INLINE void pack_pairs(const uint32_t* __restrict lanes, int32_t pairs, int32_t levels,
                             uint64_t* __restrict words) {
  const uint64_t top = top_bias(levels, kWidth);
  for_pairs(pairs, [&](int32_t j, auto count) {
    constexpr size_t kCount = decltype(count)::value;
    Pairs word = {};
#pragma GCC unroll 32
    for (int i = 0; i < 64 / kWidth; ++i) {
      PairLanes lane = {};
      memcpy(&lane, lanes + i * pairs + j, kCount * sizeof(uint32_t));
      word |= __builtin_convertvector(lane, Pairs) << (i * kWidth);
    }
    word -= top;
    memcpy(words + j, &word, kCount * sizeof(uint64_t));
  });
}

// The lanes of a sum with `bias` in each, which is taken off.
template <int kWidth>
GQSGD_INLINE void unpack_pairs(const uint64_t* __restrict words, int32_t pairs, int32_t bias,
                               uint32_t* __restrict sums) {
  const uint64_t top = top_bias(bias, kWidth);
  for_pairs(pairs, [&](int32_t j, auto count) {
    constexpr size_t kCount = decltype(count)::value;
    Pairs word = {};
    memcpy(&word, words + j, kCount * sizeof(uint64_t));
    word += top;
#pragma GCC unroll 32
    for (int i = 0; i < 64 / kWidth; ++i) {
      PairLanes lane = __builtin_convertvector(word >> (i * kWidth), PairLanes);
      lane = (lane & ((1u << kWidth) - 1)) - static_cast<uint32_t>(bias);
      memcpy(sums + i * pairs + j, &lane, kCount * sizeof(uint32_t));
    }
  });
}

// Lanes of a block, those included that no element has.
GQSGD_INLINE int64_t lanes_of(int32_t columns, int32_t width, int32_t summands) {
  if (!is_added(summands) || width == 0) return int64_t{kRows} * columns;
  return int64_t{pairs_of(columns, width)} * lanes_of_pair(width);
}
// The most of them.
constexpr int64_t kMostLanes = kTile + 32;

template <class Code>
void pack_block(const uint32_t* lanes, int32_t columns, const Code& code, int32_t summands,
                uint32_t* words) {
  const int32_t width = code.bits;
  if (is_added(summands)) {
    const int32_t pairs = pairs_of(columns, width);
    return with_width(width, [&](auto w) {
      pack_pairs<decltype(w)::value>(lanes, pairs, code.levels, reinterpret_cast<uint64_t*>(words));
    });
  }
  if (columns % 8 == 0) {
    return with_width(width,
                      [&](auto w) { pack_columns<decltype(w)::value, 8>(lanes, columns, words); });
  }
  if (columns % 4 == 0) {
    return with_width(width,
                      [&](auto w) { pack_columns<decltype(w)::value, 4>(lanes, columns, words); });
  }
  for (int32_t k = 0; k < width; ++k) {
    for (int32_t j = 0; j < columns; ++j) {
      words[k * columns + j] = packed_word(lanes, columns, k, j, width);
    }
  }
}

// Adds the lanes of one message; the sums are in the order of the elements. The first message sets
// them, and takes `bias` off.
template <bool kFirst>
GQSGD_INLINE void add_block(const uint32_t* words, int32_t columns, int32_t width, uint32_t bias,
                            uint32_t* sums) {
  if (columns % 8 == 0) {
    return with_width(width, [&](auto w) {
      add_columns<decltype(w)::value, 8, kFirst>(words, columns, bias, sums);
    });
  }
  if (columns % 4 == 0) {
    return with_width(width, [&](auto w) {
      add_columns<decltype(w)::value, 4, kFirst>(words, columns, bias, sums);
    });
  }
  for (int32_t i = 0; i < kRows; ++i) {
    for (int32_t j = 0; j < columns; ++j) {
      const uint32_t lane = unpacked_lane(words, columns, i, j, width);
      uint32_t& sum = sums[i * columns + j];
      sum = kFirst ? lane - bias : sum + lane;
    }
  }
}

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
      const LinearCode<Real> code = block_code<Real>(place.width, plan.summands);
      encode_block(x + tile.begin, tile.size, lanes_of(columns, place.width, plan.summands), code,
                   code.grid(bit_cast<Real>(norm)), tile_key(key, static_cast<uint64_t>(b)), offset,
                   lanes);
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
