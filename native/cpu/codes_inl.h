// Codes to lanes and back, a tile at a time. Included by kernels_inl.h alone.
#pragma once

#include "cache.h"
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

// A tile of whole lanes whose width is known, and whose pairs do not leave their lane: the fast
// way.
template <int kBits, class T, class Code, class Grid>
GQSGD_INLINE void encode_lanes(const T* __restrict x, int64_t words, Code code, Grid grid,
                               uint64_t keyed, uint32_t offset, uint32_t* __restrict out) {
  code.bits = kBits;
  const uint32_t bias = static_cast<uint32_t>(code.bias());
#pragma GCC unroll 8
  for (int lane = 0; lane < 32 / kBits; ++lane) {
    for (int64_t word = 0; word < words; word += 2 * kPair) {
      const int64_t first = lane * words + word;
      const T* __restrict in = x + first;
      uint32_t* __restrict to = out + word;
      prefetch(in, kTile * int64_t{sizeof(T)}, 2 * kPair * int64_t{sizeof(T)});
      for (int j = 0; j < kPair; ++j) {
        const uint32_t bits =
            hash_bits(keyed, static_cast<uint32_t>(first) + static_cast<uint32_t>(j));
        const int32_t c = code.encode(load(in[j]), grid, bits + offset);
        const int32_t d = code.encode(load(in[j + kPair]), grid, second_of_pair(bits) + offset);
        to[j] = (lane ? to[j] : bias) + (static_cast<uint32_t>(c) << (lane * kBits));
        to[j + kPair] =
            (lane ? to[j + kPair] : bias) + (static_cast<uint32_t>(d) << (lane * kBits));
      }
    }
  }
}

// Any tile: first the dither of all of its elements, a pair at a time, and then the lanes.
template <class Word, class T, class Code, class Grid>
GQSGD_INLINE void encode_any(const T* __restrict x, const Layout::Tile& tile, int64_t lanes,
                             const Code& code, Grid grid, uint64_t keyed, uint32_t offset,
                             Word* __restrict out) {
  alignas(kLine) uint32_t dither[kTile];
  for (int64_t first = 0; first < tile.size; first += 2 * kPair) {
    uint32_t* __restrict to = dither + first;
    for (int j = 0; j < kPair; ++j) {
      const uint32_t bits =
          hash_bits(keyed, static_cast<uint32_t>(first) + static_cast<uint32_t>(j));
      to[j] = bits + offset;
      to[j + kPair] = second_of_pair(bits) + offset;
    }
  }
  const Word bias = static_cast<Word>(code.bias());
  for (int64_t j = 0; j < tile.words; ++j) out[j] = bias;
  for_each_lane(tile.size, tile.words, lanes, code.bits,
                [&](int64_t first, int64_t count, int shift, bool) {
                  const T* __restrict in = x + first;
                  const uint32_t* __restrict drawn = dither + first;
                  for (int64_t j = 0; j < count; ++j) {
                    const int32_t c = code.encode(load(in[j]), grid, drawn[j]);
                    out[j] += static_cast<Word>(static_cast<int64_t>(c)) << shift;
                  }
                });
}

template <class Word, class T, class Code, class Grid>
GQSGD_INLINE void encode_tile(const T* x, const Layout::Tile& tile, int64_t lanes, const Code& code,
                              Grid grid, uint64_t keyed, uint32_t offset, Word* out) {
  with_rounding(code, [&](const auto& own) {
    if constexpr (sizeof(Word) == sizeof(uint32_t)) {
      const bool whole = tile.size == lanes * tile.words && tile.words % (2 * kPair) == 0;
      if (whole && code.bits == 8) {
        return encode_lanes<8>(x, tile.words, own, grid, keyed, offset, out);
      }
      if (whole && code.bits == 4) {
        return encode_lanes<4>(x, tile.words, own, grid, keyed, offset, out);
      }
      if (whole && code.bits == 16) {
        return encode_lanes<16>(x, tile.words, own, grid, keyed, offset, out);
      }
    }
    encode_any(x, tile, lanes, own, grid, keyed, offset, out);
  });
}

template <class T, class Word, class Code>
void quantize(const CodeArgs& args, const Code code, const T* x, uint64_t key, uint32_t offset,
              Word* words, int64_t begin, int64_t end) {
  using Real = typename Traits<T>::Real;
  using Norm = typename Traits<T>::Norm;
  const Layout layout{args.numel, args.block, lanes_per_word(args.bits)};

  for (int64_t t = begin; t < end; ++t) {
    const Layout::Tile tile = layout.tile(t);
    const Norm norm = static_cast<const Norm*>(args.norms)[tile.block];
    Word* out = words + tile.word;
    if (is_finite_norm(norm)) {
      encode_tile(x + tile.begin, tile, layout.lanes, code, code.grid(bit_cast<Real>(norm)),
                  tile_key(key, static_cast<uint64_t>(t)), offset, out);
    } else {  // codes mean nothing there: the block decodes to NaN
      for (int64_t j = 0; j < tile.words; ++j) out[j] = static_cast<Word>(code.bias());
    }
  }
}

// decoded(0), ..., decoded(count - 1) to the elements from `out` on.
template <class T, class F>
GQSGD_INLINE void store_run(T* __restrict out, int64_t count, bool streamed, F decoded) {
  // A few lines at a time: they are on their way while the next ones are decoded. Lines that are
  // not written as a whole would take longer than through the caches.
  constexpr int64_t kRun = 4 * kLine / sizeof(T);
  if (streamed && begins_line(out) && count % kRun == 0) {
    for (int64_t done = 0; done < count; done += kRun) {
      alignas(kLine) T run[kRun];
      for (int64_t j = 0; j < kRun; ++j) store(run + j, decoded(done + j));
      stream(run, out + done, 4 * kLine);
    }
  } else {
    for (int64_t j = 0; j < count; ++j) store(out + j, decoded(j));
  }
}

// For tiles [begin, end): f(number, tile, norm, streamed) where the norm is finite, and NaN
// elsewhere.
template <class T, class F>
GQSGD_INLINE void decode_tiles(const CodeArgs& args, const Layout& layout, T* out, int64_t begin,
                               int64_t end, F f) {
  using Norm = typename Traits<T>::Norm;
  const bool streamed = is_streamed<T>(args.numel);
  for (int64_t t = begin; t < end; ++t) {
    const Layout::Tile tile = layout.tile(t);
    const Norm norm = static_cast<const Norm*>(args.norms)[tile.block];
    if (is_finite_norm(norm)) {
      f(t, tile, bit_cast<typename Traits<T>::Real>(norm), streamed);
    } else {
      for (int64_t j = 0; j < tile.size; ++j) store(out + tile.begin + j, quiet_nan(norm));
    }
  }
  if (streamed) end_of_stream();
}

template <class T, class Word, class Sums>
void dequantize(const CodeArgs& args, const Sums sums, const Word* words, T* out, int64_t begin,
                int64_t end) {
  using Real = typename Traits<T>::Real;
  const Layout layout{args.numel, args.block, lanes_per_word(args.bits)};

  decode_tiles(args, layout, out, begin, end,
               [&](int64_t, const Layout::Tile& tile, Real norm, bool streamed) {
                 const Word* __restrict in = words + tile.word;
                 for_each_lane(tile.size, tile.words, layout.lanes, args.bits,
                               [&](int64_t first, int64_t count, int shift, bool top) {
                                 T* to = out + tile.begin + first;
                                 if (sums.is_signed(top)) {
                                   store_run(to, count, streamed, [=](int64_t j) {
                                     return sums.decode_signed(in[j], shift, norm);
                                   });
                                 } else {
                                   store_run(to, count, streamed, [=](int64_t j) {
                                     return sums.decode_biased(in[j], shift, norm);
                                   });
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
      const uint32_t dither = hash_bits(key, lane);
      const uint32_t a = from[i] >> shift & kMask, b = to[i] >> shift & kMask;
      sum |= exponential_sum<kBits>(a, b, dither) << shift;
    }
    to[i] = static_cast<uint8_t>(sum);
  }
}

}  // namespace
}  // namespace gqsgd
