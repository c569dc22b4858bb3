// Quantized allreduces of one tensor over MPI, from this rank's elements to the decoded result.
// They block, and any thread may call them that may call MPI.
//
// All memory that MPI sees is their own: `x` and `out` may be the same tensor, and after an error
// nothing of the caller's is still in MPI's hands.
#pragma once

#include <mpi.h>

#include <cstdint>
#include <functional>

#include "../cpu/kernels.h"

namespace gqsgd {

// Calls its last argument for parts that make up [begin, end), maybe from several threads.
using ParallelFor =
    std::function<void(int64_t begin, int64_t end, const std::function<void(int64_t, int64_t)>&)>;

// One tensor, the same on all ranks but for `x` and `offset`.
struct Tensor {
  const Kernels* kernels;
  CodeArgs args;  // without norms
  const void* x;
  void* out;
  uint64_t seed, step, id;  // what dither is drawn from
  bool correlated;
  double scale;  // of the sum over the ranks: 1/n for the mean
  ParallelFor parallel_for;
};

// Linear codes, summed by MPI_Iallreduce in chunks of about `chunk` elements, so that one chunk is
// rounded and one decoded while others are on their way.
void linear_allreduce(const Tensor& tensor, int64_t chunk, MPI_Comm comm);

// Exponential codes, summed by an MPI_Op of our own in MPI_Reduce_scatter_block, and gathered by
// MPI_Allgather. Not by MPI_Allreduce: that may evaluate the sum of the same elements on several
// ranks, from partial sums that were rounded in another order.
void exponential_allreduce(const Tensor& tensor, MPI_Comm comm);

// The headroom that codes of so many ranks need, whichever order they are combined in: each sum of
// two is rounded to at most twice the larger one, so n ranks reach 2^(n-1) times the largest level.
constexpr int headroom_for(int ranks) { return ranks - 1; }

}  // namespace gqsgd
