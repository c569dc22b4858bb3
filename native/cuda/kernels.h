// The kernels on a GPU. They are enqueued on a stream and return at once, loop over the same tiles
// as those of the CPU, with the maths of the same headers, and give the same bits. Pointers are to
// memory of the current device; results depend neither on the launch nor on the device.
#pragma once

#include <cuda_runtime.h>

#include "core/args.h"
#include "core/block_bits.h"

namespace gqsgd {

// What each of them does is said in cpu/kernels.h.
struct CudaKernels {
  cudaStream_t stream;

  void block_max(DType, const void* x, int64_t numel, int64_t block, void* norms, int64_t begin,
                 int64_t end) const;
  void block_argmax(DType, const void* x, int64_t numel, int64_t block, void* places, bool bytes,
                    int64_t begin, int64_t end) const;
  void block_squares(const CodeArgs&, const void* x, int64_t* squares, int64_t begin,
                     int64_t end) const;
  void l2_norms(DType, void* norms, const int64_t* squares, int64_t begin, int64_t end) const;
  void quantize(const CodeArgs&, const void* x, uint64_t key, uint32_t offset, void* words,
                int64_t begin, int64_t end) const;
  void dequantize(const CodeArgs&, const void* words, int64_t contributors, double scale, void* out,
                  int64_t begin, int64_t end) const;
  void sum_codes(const CodeArgs&, const Received& received, double scale, void* out, int64_t begin,
                 int64_t end) const;
  void requantize(const CodeArgs&, const Received& received, uint64_t key, void* means,
                  int64_t first, int64_t begin, int64_t end) const;
  void dequantize_means(const CodeArgs&, const void* means, double scale, void* out, int64_t first,
                        int64_t begin, int64_t end) const;
  void combine(int bits, const void* from, void* to, uint64_t key, int64_t bytes) const;
  // To *sum; `parts` is memory for one double for each kSquaresPart elements.
  void sum_of_squares(DType, const void* x, int64_t numel, double* parts, double* sum) const;
  void block_widths(DType, const void* norms, const uint8_t* columns, int64_t blocks,
                    const WidthRule&, int64_t begin, int64_t end, int32_t* widths,
                    int32_t* starts) const;
  void quantize_blocks(const CodeArgs&, const BlockPlan&, const void* x, uint64_t key,
                       uint32_t offset, uint32_t* words, int64_t begin, int64_t end) const;
  void sum_blocks(const CodeArgs&, const BlockPlan&, const Received& received, double scale,
                  void* out, int64_t begin, int64_t end) const;
  void requantize_blocks(const CodeArgs&, const BlockPlan&, const Received& received, uint64_t key,
                         void* shares, uint32_t* words, int64_t first, int64_t begin,
                         int64_t end) const;
  void dequantize_blocks(const CodeArgs&, const BlockPlan&, const void* shares,
                         const uint32_t* words, double scale, void* out, int64_t first,
                         int64_t begin, int64_t end) const;
};

}  // namespace gqsgd
