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
//
// Where unsigned words can be added, the top lane is like all others, and words of bytes may be
// added as bytes: summed words are at most 2^(bL) - 1.
//
// Codes that are not added, those of exponential dithering, lie in their lanes as they are.
#pragma once

#include "gqsgd/config.h"

namespace gqsgd {

constexpr int64_t kTile = 1024;

// For a >= 0, b >= 1; a + b - 1 could overflow.
GQSGD_INLINE int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

GQSGD_INLINE bool fits_int32(int bits) { return 32 % bits == 0; }
GQSGD_INLINE int lanes_per_word(int bits) { return (fits_int32(bits) ? 32 : 64) / bits; }

// What to add to a word of bare codes: s in every lane but, for signed words, the top one.
GQSGD_INLINE uint64_t lane_bias(int bits, int32_t levels, bool unsigned_words) {
  uint64_t bias = 0;
  for (int lane = 0; lane + !unsigned_words < lanes_per_word(bits); ++lane) {
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
  // Where the words of tile `index` begin; for the number of tiles, where the last one's end.
  GQSGD_MEMBER int64_t word(int64_t index) const {
    return index == tiles() ? words() : tile(index).word;
  }
};

// How the means of a two-phase exchange travel: for each tile a norm of its own and its words, so
// that the parts that ranks send, put end to end, make the whole. Offsets are counted in units of
// the larger of a norm and a word, and everything begins on one.
struct MeansLayout {
  Layout layout;
  int64_t word_size, unit;

  GQSGD_MEMBER int64_t units_of_tile(int64_t elements) const {
    return elements ? 1 + ceil_div(ceil_div(elements, layout.lanes) * word_size, unit) : 0;
  }
  GQSGD_MEMBER int64_t units_of(int64_t elements) const {
    return (elements / kTile) * units_of_tile(kTile) + units_of_tile(elements % kTile);
  }
  // Where tile `index` begins; for the number of tiles, where the last one ends.
  GQSGD_MEMBER int64_t begin(int64_t index) const {
    const int64_t block_index = index / layout.tiles_per_block();
    const int64_t inside = index % layout.tiles_per_block();
    if (index == layout.tiles()) {
      return (layout.numel / layout.block) * units_of(layout.block) +
             units_of(layout.numel % layout.block);
    }
    return block_index * units_of(layout.block) + inside * units_of_tile(kTile);
  }
};

}  // namespace gqsgd
