// How threads share tiles and walk their lanes; see codes.cu.
#pragma once

#include "device.h"

namespace gqsgd {
namespace {

// Consecutive words of one thread: as many as make packs, of elements and of words. Lanes of wider
// words begin anywhere, so that there are no packs to make.
template <class T, class Word>
constexpr int words_of_thread = sizeof(Word) == 8 ? 1
                                : sizeof(T) == 2  ? 8
                                                  : 4;

struct Runs {
  unsigned grid;
  dim3 threads;
};

inline Runs runs_for(const Layout& layout, int words_of_thread, int64_t tiles) {
  if (tiles <= 0) return {0, dim3(1)};
  const int64_t words = ceil_div(layout.largest_tile(), layout.lanes);
  const dim3 threads = threads_for(ceil_div(words, words_of_thread));
  return {grid_for(tiles, threads.y), threads};
}

// f(tile's number, tile, first word) for this thread's words of tiles [begin, end).
template <int kWords, class F>
__device__ __forceinline__ void for_each_run(const Layout& layout, int64_t begin, int64_t end,
                                             F f) {
  const int word = static_cast<int>(threadIdx.x) * kWords;
  const int64_t tiles = int64_t{gridDim.x} * blockDim.y;
  for (int64_t t = begin + int64_t{blockIdx.x} * blockDim.y + threadIdx.y; t < end; t += tiles) {
    const Layout::Tile tile = layout.tile(t);
    if (word < tile.words) f(t, tile, word);
  }
}

// f(std::true_type) where packs can be used for the elements from `x` on, of every lane of a tile,
// and for words; f(std::false_type) otherwise.
template <int kWords, class T, class Word, class F>
__device__ __forceinline__ void if_packed(const Layout& layout, const Layout::Tile& tile,
                                          const T* x, const Word* words, F f) {
  if (kWords > 1 && tile.size == layout.lanes * tile.words && tile.words % kWords == 0 &&
      is_aligned(x) && is_aligned(words)) {
    f(std::true_type{});
  } else {
    f(std::false_type{});
  }
}

// How many of a thread's words, from `word` on, a tile has, and how many elements of one lane, from
// `first` on, they hold.
template <int kWords, bool kPacked>
__device__ __forceinline__ int words_left(const Layout::Tile& tile, int word) {
  const int left = static_cast<int>(tile.words) - word;
  return kPacked || left > kWords ? kWords : left;
}
template <int kWords, bool kPacked>
__device__ __forceinline__ int elements_left(const Layout::Tile& tile, int word, int first) {
  const int words = words_left<kWords, kPacked>(tile, word);
  const int left = static_cast<int>(tile.size) - first;
  return kPacked || left > words ? words : left;
}

// f(lane), unrolled where the width is known.
template <int kBits, class Word, class F>
__device__ __forceinline__ void for_each_lane(const Layout& layout, F f) {
  if constexpr (kBits > 0) {
#pragma unroll
    for (int lane = 0; lane < static_cast<int>(sizeof(Word)) * 8 / kBits; ++lane) f(lane);
  } else {
    for (int lane = 0; lane < static_cast<int>(layout.lanes); ++lane) f(lane);
  }
}

// decode(word, lane, whether it is the top one) for every lane of some words, to the elements from
// `out` on; NaN if the norm is not finite.
template <int kBits, bool kPacked, int kWords, class Norm, class T, class Word, class F>
__device__ __forceinline__ void store_lanes(const Layout& layout, const Layout::Tile& tile,
                                            int word, Norm norm, const Word (&words)[kWords],
                                            T* out, F decode) {
  const bool finite = is_finite_norm(norm);
  for_each_lane<kBits, Word>(layout, [&](int lane) {
    const int first = lane * static_cast<int>(tile.words) + word;
    T to[kWords];
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      const auto value = decode(words[k], lane, lane + 1 == layout.lanes);
      store(&to[k], finite ? value : quiet_nan(norm));
    }
    store_run(out + first, elements_left<kWords, kPacked>(tile, word, first), kPacked, to);
  });
}

// f(width as a constant, 0 where it is left to run time); kBits: the width if it is known, or 0
template <int kBits, class Word, class F>
void with_bits(int bits, F f) {
  if constexpr (kBits > 0 || sizeof(Word) == 8) {
    f(std::integral_constant<int, kBits>{});
  } else {
    switch (bits) {
      case 2:
        return f(std::integral_constant<int, 2>{});
      case 4:
        return f(std::integral_constant<int, 4>{});
      case 8:
        return f(std::integral_constant<int, 8>{});
      case 16:
        return f(std::integral_constant<int, 16>{});
    }
  }
}

}  // namespace
}  // namespace gqsgd
