// The lanes of a block in its words, and back; see core/block_bits.h. Included by block_bits_inl.h
// alone.
#pragma once

#include "codes_inl.h"
#include "core/block_bits.h"

namespace gqsgd {
namespace {

// Columns that are packed at once. Sizes are given in full: GCC ignores one that is a template's.
template <int kVector>
struct Vector;
template <>
struct Vector<4> {
  using Lanes = uint32_t __attribute__((vector_size(16)));
};
template <>
struct Vector<8> {
  using Lanes = uint32_t __attribute__((vector_size(32)));
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

// f(j, count) for the words from j on: `kPairs` at once, of which the last ones may come twice.
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

}  // namespace
}  // namespace gqsgd
