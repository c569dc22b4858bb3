// Quantized allreduces of one tensor over MPI, from this rank's elements to the decoded result.
// They block, and may be called from any thread that may call MPI.
//
// All memory that MPI sees is their own: `x` and `out` may be the same, and after an error nothing
// of the caller's is in MPI's hands.
#pragma once

#include <mpi.h>

#include <cstdint>
#include <functional>

#include "cpu/kernels.h"

namespace gqsgd {

// Calls its last argument for parts that make up [begin, end), perhaps on several threads.
using ParallelFor =
    std::function<void(int64_t begin, int64_t end, const std::function<void(int64_t, int64_t)>&)>;

// One tensor and what becomes of it. All but `x` is the same on all ranks.
struct Reduction {
  const Kernels* kernels;
  ParallelFor parallel_for;
  CodeArgs args;  // without norms
  const void* x;
  void* out;
  uint64_t seed, step, tensor;  // what dither is drawn from
  bool correlated;
  double scale;  // of the sum over the ranks: 1/n for the mean
};

// Linear codes, summed by MPI_Iallreduce in chunks of so many elements: while one chunk is on its
// way, the next one is rounded and the one before decoded.
void linear_allreduce(const Reduction& reduction, int64_t chunk, MPI_Comm comm);

// Exponential codes, summed by an MPI_Op of our own in MPI_Reduce_scatter_block and gathered by
// MPI_Allgather. Never in an MPI_Allreduce: it may sum the same elements on several ranks, each in
// another order, and as sums are rounded the ranks would get different results.
void exponential_allreduce(const Reduction& reduction, MPI_Comm comm);

// Codes to be combined in any order need room for this many doublings: the sum of two is rounded to
// at most twice the larger one, so that n ranks reach at most 2^(n-1) times the largest level.
constexpr int headroom_for(int ranks) { return ranks - 1; }

}  // namespace gqsgd
