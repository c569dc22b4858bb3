// Counter-based dither: the random number of an element is a hash of where it is, never the next
// output of a generator. So it is the same on every rank, thread count and device.
#pragma once

#include "core/config.h"

namespace gqsgd {

// The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a bijection on 64 bits.
GQSGD_INLINE uint64_t mix64(uint64_t x) {
  x ^= x >> 30;
  x *= 0xbf58476d1ce4e5b9u;
  x ^= x >> 27;
  x *= 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// The stream of the second rounding of a two-phase exchange, which one rank does for all.
constexpr uint64_t kRequantizeStream = ~uint64_t{0};

// The streams, one a rank, that the rounding of combined codes draws from.
constexpr uint64_t kCombineStream = uint64_t{1} << 32;

// A tensor has a number of 31 bits. Above it is the first tile, if a part of the tensor is coded on
// its own: the part has the dither that it has in the whole tensor.
constexpr int kFirstTileShift = 31;

// One stream of dither: of one tensor at one step, shared by all ranks or of one rank alone.
// `stream` is 0 for the shared one and 1 + rank otherwise, or one of those above.
GQSGD_INLINE uint64_t dither_key(uint64_t seed, uint64_t step, uint64_t tensor, uint64_t stream) {
  const uint64_t odd = 0x9e3779b97f4a7c15u;
  const uint64_t first_tile = tensor >> kFirstTileShift;
  const uint64_t number = tensor & ((uint64_t{1} << kFirstTileShift) - 1);
  uint64_t key = mix64(seed + odd);
  key = mix64(key ^ (step + odd));
  key = mix64(key ^ (number + 2 * odd));
  return mix64(key ^ (stream + 3 * odd)) + first_tile;
}

// The part of the key that is the same for all elements of one tile.
GQSGD_INLINE uint64_t tile_key(uint64_t key, uint64_t tile) { return mix64(key + tile); }

// 32 random bits for place `index` of a tile. Two multiplications: the constants are those of Chris
// Wellons' lowbias32, with half of the key added before the first round and half before the second,
// so that no two tiles walk the same sequence.
GQSGD_INLINE uint32_t hash_bits(uint64_t tile_key, uint32_t index) {
  uint32_t x = index + static_cast<uint32_t>(tile_key);
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= (x >> 15) ^ static_cast<uint32_t>(tile_key >> 32);
  x *= 0x846ca68bu;
  return x;
}

// Two elements of a tile, kPair apart, share one hash: with h and l for its upper and lower half,
// the first one has (h, l) and the second one (h ^ l, l). Each has all of 32 random bits, and their
// upper halves are independent: (h, l) -> (h, h ^ l) is one to one. So the dithers of a pair are as
// good as unrelated, down to 2^-16 of a level.
constexpr int kPair = 16;
GQSGD_INLINE uint32_t second_of_pair(uint32_t first) { return first ^ (first << 16); }

// 32 random bits for element `index` of a tile.
GQSGD_INLINE uint32_t dither_bits(uint64_t tile_key, uint32_t index) {
  const uint32_t first = hash_bits(tile_key, index & ~uint32_t{kPair});
  return index & kPair ? second_of_pair(first) : first;
}

// Correlated dithering: rank r of n uses xi_r = frac(U + ((r + h) mod n) / n) with U and h shared
// by the ranks. U is uniform, so U + h/n modulo 1 is uniform too, and U is drawn in its place: the
// law is the same and h need not be. In units of 2^-32, to be added to U modulo 2^32.
GQSGD_INLINE uint32_t rank_offset(uint32_t rank, uint32_t world_size) {
  return static_cast<uint32_t>((static_cast<uint64_t>(rank) << 32) / world_size);
}

// What one rank draws its dither from: that of an element is dither_bits() plus `offset`.
struct RankDither {
  uint64_t key;
  uint32_t offset;
};
GQSGD_INLINE RankDither rank_dither(uint64_t seed, uint64_t step, uint64_t tensor, uint32_t rank,
                                    uint32_t world_size, bool correlated) {
  if (correlated) return {dither_key(seed, step, tensor, 0), rank_offset(rank, world_size)};
  return {dither_key(seed, step, tensor, 1 + uint64_t{rank}), 0};
}

}  // namespace gqsgd
