// Blocks of different widths; see core/block_bits.h. Included by kernels_inl.h alone.
#pragma once

#include "codes_inl.h"
#include "core/block_bits.h"

namespace gqsgd {
namespace {

// Columns that are packed at once.
constexpr int kVector = 8;
using Lanes = uint32_t __attribute__((vector_size(kVector * sizeof(uint32_t))));

// By reference: without AVX, how such a vector is returned is not the same everywhere.
GQSGD_INLINE void load_lanes(const uint32_t* from, Lanes& lanes) {
  memcpy(&lanes, from, sizeof(lanes));
}

template <int kWidth>
GQSGD_INLINE void pack_columns(const uint32_t* __restrict lanes, int32_t columns,
                               uint32_t* __restrict words) {
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

template <int kWidth>
GQSGD_INLINE void add_columns(const uint32_t* __restrict words, int32_t columns,
                              uint32_t* __restrict sums) {
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
      load_lanes(sums + i * columns + j, sum);
      sum += lane & ((1u << kWidth) - 1);
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

template <int kWidth>
GQSGD_INLINE void pack_pairs(const uint32_t* __restrict lanes, int32_t pairs, int32_t levels,
                             uint64_t* __restrict words) {
  const uint64_t top = top_bias(levels, kWidth);
  for (int32_t j = 0; j < pairs; ++j) {
    uint64_t word = 0;
#pragma GCC unroll 32
    for (int i = 0; i < 64 / kWidth; ++i) {
      word |= uint64_t{lanes[i * pairs + j]} << (i * kWidth);
    }
    words[j] = word - top;
  }
}

template <int kWidth>
GQSGD_INLINE void unpack_pairs(const uint64_t* __restrict words, int32_t pairs, int32_t bias,
                               uint32_t* __restrict sums) {
  const uint64_t top = top_bias(bias, kWidth);
  constexpr uint32_t kMask = (1u << kWidth) - 1;
#pragma GCC unroll 32
  for (int i = 0; i < 64 / kWidth; ++i) {
    for (int32_t j = 0; j < pairs; ++j) {
      sums[i * pairs + j] += static_cast<uint32_t>((words[j] + top) >> (i * kWidth)) & kMask;
    }
  }
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
  if (columns % kVector == 0) {
    return with_width(width,
                      [&](auto w) { pack_columns<decltype(w)::value>(lanes, columns, words); });
  }
  for (int32_t k = 0; k < width; ++k) {
    for (int32_t j = 0; j < columns; ++j) {
      words[k * columns + j] = packed_word(lanes, columns, k, j, width);
    }
  }
}

// Adds the lanes of one message, with `bias` in all of them; the sums are in the order of the
// elements.
void add_block(const uint32_t* words, int32_t columns, int32_t width, int32_t summands,
               int32_t bias, uint32_t* sums) {
  if (is_added(summands)) {
    const int32_t pairs = pairs_of(columns, width);
    return with_width(width, [&](auto w) {
      unpack_pairs<decltype(w)::value>(reinterpret_cast<const uint64_t*>(words), pairs, bias, sums);
    });
  }
  if (columns % kVector == 0) {
    return with_width(width,
                      [&](auto w) { add_columns<decltype(w)::value>(words, columns, sums); });
  }
  for (int32_t i = 0; i < kRows; ++i) {
    for (int32_t j = 0; j < columns; ++j) {
      sums[i * columns + j] += unpacked_lane(words, columns, i, j, width);
    }
  }
}

// The words of all blocks at an offset.
GQSGD_INLINE int64_t words_at(int32_t offset, const int32_t* __restrict weights,
                              const uint8_t* __restrict columns, int64_t blocks, WidthRule rule) {
  constexpr int64_t kRun = 4096;  // sums of so many fit 32 bits
  int64_t total = 0;
  if (is_added(rule.summands)) {
    for (int64_t b = 0; b < blocks; ++b) {
      total +=
          block_words(columns[b], widened(width_at(weights[b], offset, rule), rule), rule.summands);
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
  const int32_t offset = best_offset(smallest, largest, rule, end - begin, [&](int32_t at) {
    return words_at(at, widths, columns, blocks, rule);
  });
  // What is left goes to the blocks that are the next to become wider, as far as it goes.
  int64_t left = end - begin - words_at(offset, widths, columns, blocks, rule), at = begin;
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
  const int64_t messages = place.width ? received.ranks : 0;
  const int32_t bias = code.levels * plan.contributors;
  const uint32_t biases = static_cast<uint32_t>(bias * messages);
  const int64_t count = lanes_of(columns, place.width, plan.summands);
  for (int64_t i = 0; i < count; ++i) sums[i] = 0u - biases;
  for (int64_t message = 0; message < messages; ++message) {
    const auto* in = static_cast<const uint32_t*>(received.words) + message * received.stride;
    add_block(in + place.start, columns, place.width, plan.summands, bias, sums);
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
