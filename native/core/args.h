// What kernels are told about a tensor, on whatever device it is.
#pragma once

#include "core/config.h"

namespace gqsgd {

enum class DType { kFloat32, kFloat64, kFloat16, kBFloat16 };

// Numbered as CodeKind of hvd_gqsgd/codecs/base.py; codes.h has the code of each kind.
// kNearest: linear ones, rounded to nearest and not by dither.
enum class CodeKind { kLinear, kExponential, kNearest };

// Numbers of levels a side.
struct LevelRange {
  int32_t least, most;
};

// What both directions of a code need to know of a tensor. `norms` has one entry a block: int32
// bits of a float, for float64 tensors int64 bits of a double.
struct CodeArgs {
  DType dtype;
  int64_t numel;
  int64_t block;  // elements that share a norm
  CodeKind kind;
  int bits;        // lane width: 2 to 16
  int32_t levels;  // a side, in the range that the kind has at this width
  const void* norms;
  // Linear: the top lane of a word is biased like the others, for sums of unsigned integers.
  bool unsigned_words = false;
  // Exponential: elements are scaled by 2^-headroom, so that codes of ranks may be combined.
  int headroom = 0;
};

// The codes of one tensor's tiles from `begin` on, as `ranks` ranks have sent them to the one that
// owns those tiles.
struct Received {
  const void* words;  // rank 0's
  int64_t ranks;
  int64_t stride;  // words from one rank's to the next one's
};

// Squares of so many elements are added up in a row, and then these sums.
constexpr int64_t kSquaresPart = 4096;

}  // namespace gqsgd
