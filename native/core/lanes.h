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

#include "core/config.h"

namespace gqsgd {

constexpr int64_t kTile = 1024;

template <class Word>
struct Signed;
template <>
struct Signed<uint32_t> {
  using type = int32_t;
};
template <>
struct Signed<uint64_t> {
  using type = int64_t;
};
template <class Word>
using SignedOf = typename Signed<Word>::type;

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
  // Of a full block, and of its tiles but the last one. Divided here, and not for every tile.
  int64_t block_tiles, block_words, tile_words;

  GQSGD_MEMBER Layout(int64_t numel, int64_t block, int64_t lanes)
      : numel(numel),
        block(block),
        lanes(lanes),
        block_tiles(ceil_div(block, kTile)),
        block_words(words_of(block, lanes)),
        tile_words(ceil_div(block < kTile ? block : kTile, lanes)) {}

  GQSGD_INLINE int64_t words_of(int64_t elements, int64_t lanes) {
    return (elements / kTile) * ceil_div(kTile, lanes) + ceil_div(elements % kTile, lanes);
  }
  struct Tile {
    int64_t block, begin, size, word, words;  // begin: first element; word: first word
  };
  GQSGD_MEMBER int64_t blocks() const { return ceil_div(numel, block); }
  GQSGD_MEMBER int64_t tiles() const { return tiles_before(blocks()); }
  // How many tiles the first blocks have.
  GQSGD_MEMBER int64_t tiles_before(int64_t blocks) const {
    return blocks * block <= numel ? blocks * block_tiles
                                   : (blocks - 1) * block_tiles + ceil_div(numel % block, kTile);
  }
  GQSGD_MEMBER int64_t words() const {
    return (numel / block) * block_words + words_of(numel % block, lanes);
  }
  // How many elements the largest tile has.
  GQSGD_MEMBER int64_t largest_tile() const {
    const int64_t most = block < numel ? block : numel;
    return most < kTile ? most : kTile;
  }
  GQSGD_MEMBER Tile tile(int64_t index) const {
    const int64_t block_index = block_tiles == 1 ? index : index / block_tiles;
    const int64_t inside = index - block_index * block_tiles;
    const int64_t first = inside * kTile, left = numel - block_index * block - first;
    const int64_t rest = block - first < kTile ? block - first : kTile;
    const int64_t size = left < rest ? left : rest;
    const bool full = size == (block < kTile ? block : kTile);
    return {block_index, block_index * block + first, size,
            block_index * block_words + inside * tile_words,
            full ? tile_words : ceil_div(size, lanes)};
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
  // Of a full block, and of its tiles but the last one. Divided here, and not for every tile.
  int64_t block_units, tile_units;

  GQSGD_MEMBER MeansLayout(const Layout& layout, int64_t word_size, int64_t unit)
      : layout(layout),
        word_size(word_size),
        unit(unit),
        block_units(units_of(layout.block)),
        tile_units(units_of_tile(layout.block < kTile ? layout.block : kTile)) {}

  GQSGD_MEMBER int64_t units_of_tile(int64_t elements) const {
    return elements ? 1 + ceil_div(ceil_div(elements, layout.lanes) * word_size, unit) : 0;
  }
  GQSGD_MEMBER int64_t units_of(int64_t elements) const {
    return (elements / kTile) * units_of_tile(kTile) + units_of_tile(elements % kTile);
  }
  // Where tile `index` begins; for the number of tiles, where the last one ends.
  GQSGD_MEMBER int64_t begin(int64_t index) const {
    if (index == layout.tiles()) {
      return (layout.numel / layout.block) * block_units + units_of(layout.numel % layout.block);
    }
    return begin_of(index);
  }
  // The same for a tile that there is, without a division in most cases.
  GQSGD_MEMBER int64_t begin_of(int64_t index) const {
    const int64_t block_index = layout.block_tiles == 1 ? index : index / layout.block_tiles;
    return block_index * block_units + (index - block_index * layout.block_tiles) * tile_units;
  }
};

}  // namespace gqsgd
