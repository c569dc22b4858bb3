// The CPU kernels behind raw pointers. Each loops over a range of blocks or tiles (see lanes.h), so
// that a caller may share the work among threads: the result does not depend on how it is cut.
#pragma once

#include "core/args.h"
#include "core/block_bits.h"

namespace gqsgd {

struct Kernels {
  const char* name;
  // Largest magnitude of blocks [begin, end) of x, to norms[begin, end).
  void (*block_max)(DType, const void* x, int64_t numel, int64_t block, void* norms, int64_t begin,
                    int64_t end);
  // The place in its block of the first element with the largest magnitude, for blocks [begin, end)
  // of at most 256 elements if places are bytes, and of 65536 if they are not.
  void (*block_argmax)(DType, const void* x, int64_t numel, int64_t block, void* places, bool bytes,
                       int64_t begin, int64_t end);
  // Sum of the squares of blocks [begin, end) in units of l2.h, to squares[begin, end). Levels and
  // bits are not looked at.
  void (*block_squares)(const CodeArgs&, const void* x, int64_t* squares, int64_t begin,
                        int64_t end);
  // Largest magnitudes of blocks [begin, end) become L2 norms. Of `dtype`, only the arithmetic type
  // counts.
  void (*l2_norms)(DType, void* norms, const int64_t* squares, int64_t begin, int64_t end);
  // Codes of tiles [begin, end). `key` is a dither_key(); `offset` is added to all dither.
  void (*quantize)(const CodeArgs&, const void* x, uint64_t key, uint32_t offset, void* words,
                   int64_t begin, int64_t end);
  // out = (sum of codes) * scale / levels * norm for tiles [begin, end), where `contributors` ranks
  // have added or, of exponential codes, combined their words. Blocks with a norm that is not
  // finite become NaN.
  void (*dequantize)(const CodeArgs&, const void* words, int64_t contributors, double scale,
                     void* out, int64_t begin, int64_t end);
  // out = (sum of the codes of all ranks) * scale / levels * norm for tiles [begin, end), where
  // `received` has all tiles. Blocks with a norm that is not finite become NaN.
  void (*sum_codes)(const CodeArgs&, const Received& received, double scale, void* out,
                    int64_t begin, int64_t end);
  // The mean over the ranks of tiles [begin, end), rounded again, as laid out by MeansLayout:
  // `received` and `means` begin with tile `first`. Of `dtype`, only the arithmetic type counts.
  void (*requantize)(const CodeArgs&, const Received& received, uint64_t key, void* means,
                     int64_t first, int64_t begin, int64_t end);
  // out = mean * scale for tiles [begin, end); `means` begins with tile `first`.
  void (*dequantize_means)(const CodeArgs&, const void* means, double scale, void* out,
                           int64_t first, int64_t begin, int64_t end);
  // Exponential codes of `bits` bits, 4 or 8, in `bytes` bytes: `to` becomes the sum of both, each
  // lane rounded by dither of this key.
  void (*combine)(int bits, const void* from, void* to, uint64_t key, int64_t bytes);
  // Sum of the squares of x in double, in an order that is the same everywhere.
  double (*sum_of_squares)(DType, const void* x, int64_t numel);

  // Widths of `blocks` blocks, of so many columns each, that share the words [begin, end) of a
  // message, and where their words begin. Of `dtype`, only the arithmetic type counts.
  void (*block_widths)(DType, const void* norms, const uint8_t* columns, int64_t blocks,
                       const WidthRule&, int64_t begin, int64_t end, int32_t* widths,
                       int32_t* starts);
  // As the functions of the same names above, for blocks of the widths of a plan and of at most
  // kTile elements, each a tile. Kind, bits and levels of the arguments are not looked at. Words
  // that no block has become zero.
  void (*quantize_blocks)(const CodeArgs&, const BlockPlan&, const void* x, uint64_t key,
                          uint32_t offset, uint32_t* words, int64_t begin, int64_t end);
  void (*sum_blocks)(const CodeArgs&, const BlockPlan&, const Received& received, double scale,
                     void* out, int64_t begin, int64_t end);
  // The norms of the means, as shares of the global ones, go to `shares`, from block `first` on.
  void (*requantize_blocks)(const CodeArgs&, const BlockPlan&, const Received& received,
                            uint64_t key, void* shares, uint32_t* words, int64_t first,
                            int64_t begin, int64_t end);
  void (*dequantize_blocks)(const CodeArgs&, const BlockPlan&, const void* shares,
                            const uint32_t* words, double scale, void* out, int64_t first,
                            int64_t begin, int64_t end);
};

// The tables for each instruction set that this build holds and this processor runs, best last.
int available_kernels(const Kernels* tables[3]);

// The same loops, compiled for each instruction set; null where the compiler cannot.
const Kernels* generic_kernels();
const Kernels* x86_64_v3_kernels();
const Kernels* x86_64_v4_kernels();

}  // namespace gqsgd
