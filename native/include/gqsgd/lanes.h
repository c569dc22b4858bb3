// How codes are laid out in words, so that adding words adds codes.
//
// A word is an int32 where the lane width b divides 32 and an int64 otherwise, with L = floor(W/b)
// lanes. A tensor is cut in norm blocks, a block in tiles of at most kTile elements, and a tile of
// m elements takes ceil(m/L) words: lane l of word j holds element l * ceil(m/L) + j, so that loops
// run over consecutive elements and consecutive words whatever the width.
//
// Lanes hold u = code + s, at most 2s, and n ranks add up to at most 2sn <= 2^b - 1: no lane
// spills. The top lane holds the code itself, without + s, so that the word as a signed integer
// never overflows either: summed words lie in [-sn * 2^(b(L-1)), (sn + 1) * 2^(b(L-1)) - 1].
#pragma once

#include "gqsgd/config.h"

namespace gqsgd {

constexpr int64_t kTile = 1024;

GQSGD_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

GQSGD_INLINE bool fits_int32(int bits) { return 32 % bits == 0; }
GQSGD_INLINE int lanes_per_word(int bits) { return (fits_int32(bits) ? 32 : 64) / bits; }

// What to add to a word of bare codes: s in every lane but the top one.
GQSGD_INLINE uint64_t lane_bias(int bits, int32_t levels) {
  uint64_t bias = 0;
  for (int lane = 0; lane + 1 < lanes_per_word(bits); ++lane) {
    bias |= static_cast<uint64_t>(levels) << (bits * lane);
  }
  return bias;
}

// Where the tiles of a tensor lie. Tiles are numbered through the tensor, block by block.
struct Layout {
  int64_t numel, block, lanes;

  GQSGD_INLINE int64_t words_of(int64_t elements, int64_t lanes) {
    return (elements / kTile) * ceil_div(kTile, lanes) + ceil_div(elements % kTile, lanes);
  }
  struct Tile {
    int64_t block, begin, size, word, words;  // begin: first element; word: first word
  };
#if defined(__CUDACC__)
#define GQSGD_MEMBER __host__ __device__ __forceinline__
#else
#define GQSGD_MEMBER inline __attribute__((always_inline))
#endif
  GQSGD_MEMBER int64_t blocks() const { return ceil_div(numel, block); }
  GQSGD_MEMBER int64_t tiles_per_block() const { return ceil_div(block, kTile); }
  GQSGD_MEMBER int64_t tiles() const {
    return (numel / block) * tiles_per_block() + ceil_div(numel % block, kTile);
  }
  GQSGD_MEMBER int64_t words() const {
    return (numel / block) * words_of(block, lanes) + words_of(numel % block, lanes);
  }
  GQSGD_MEMBER Tile tile(int64_t index) const {
    const int64_t block_index = index / tiles_per_block(), inside = index % tiles_per_block();
    const int64_t left = numel - block_index * block;
    const int64_t block_size = left < block ? left : block;
    const int64_t size = block_size - inside * kTile < kTile ? block_size - inside * kTile : kTile;
    return {block_index, block_index * block + inside * kTile, size,
            block_index * words_of(block, lanes) + inside * ceil_div(kTile, lanes),
            ceil_div(size, lanes)};
  }
};

}  // namespace gqsgd
