// The CPU kernels behind raw pointers. Each loops over a range of blocks or tiles (see lanes.h), so
// that a caller may share the work among threads: the result does not depend on how it is cut.
#pragma once

#include <cstdint>

namespace gqsgd {

enum class DType { kFloat32, kFloat64, kFloat16, kBFloat16 };

// What both directions of linear dithering need to know of a tensor. `norms` has one entry a block:
// int32 bits of a float, for float64 tensors int64 bits of a double.
struct LinearArgs {
  DType dtype;
  int64_t numel;
  int64_t block;   // elements that share a norm
  int bits;        // lane width, 2 to 16
  int32_t levels;  // s: levels a side, 1 to 2^15 - 1
  const void* norms;
};

struct Kernels {
  const char* name;
  // Largest magnitude of blocks [begin, end) of x, to norms[begin, end).
  void (*block_max)(DType, const void* x, int64_t numel, int64_t block, void* norms, int64_t begin,
                    int64_t end);
  // Codes of tiles [begin, end). `key` is a dither_key(); `offset` is added to all dither.
  void (*quantize)(const LinearArgs&, const void* x, uint64_t key, uint32_t offset, void* words,
                   int64_t begin, int64_t end);
  // out = (sum of codes) * scale / levels * norm for tiles [begin, end), where `contributors` ranks
  // have added their words. Blocks with a norm that is not finite become NaN.
  void (*dequantize)(const LinearArgs&, const void* words, int64_t contributors, double scale,
                     void* out, int64_t begin, int64_t end);
};

// The tables for each instruction set that this build holds and this processor runs, best last.
int available_kernels(const Kernels* tables[3]);

// The same loops, compiled for each instruction set; null where the compiler cannot.
const Kernels* generic_kernels();
const Kernels* x86_64_v3_kernels();
const Kernels* x86_64_v4_kernels();

}  // namespace gqsgd
