// The quantized allreduce of one tensor over NCCL, from this rank's elements to the decoded result.
#pragma once

#include "cuda/kernels.h"
#include "nccl/communicator.h"

namespace gqsgd {

// One tensor, what becomes of it, and memory for what is on the way. All pointers are to the GPU;
// `x` and `out` may be the same. All but the pointers is the same on all ranks.
struct NcclReduction {
  CodeArgs args;  // without norms
  const void* x;
  void* out;
  void* norms;
  int64_t* squares;  // one a block, for L2 norms; null for largest magnitudes
  void* words;
  uint64_t seed, step, tensor;  // what dither is drawn from
  bool correlated;
  double scale;  // of the sum over the ranks: 1/n for the mean
};

// Linear codes, summed as integers. Everything is enqueued on the stream of `kernels`: norms and
// codes never leave the GPU, and the host waits for nothing.
void linear_allreduce(const NcclReduction& reduction, const CudaKernels& kernels, NcclGroup& group);

}  // namespace gqsgd
