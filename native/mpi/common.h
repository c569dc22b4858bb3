// What both allreduces do first: who is there, and the norms of all blocks over all ranks.
#pragma once

#include "core/hash.h"
#include "core/lanes.h"
#include "mpi/allreduce.h"
#include "mpi/errors.h"
#include "mpi/memory.h"

namespace gqsgd {

struct Group {
  MPI_Comm comm;
  int rank, size;

  explicit Group(MPI_Comm comm) : comm(comm) {
    check_mpi(MPI_Comm_rank(comm, &rank), "MPI_Comm_rank");
    check_mpi(MPI_Comm_size(comm, &size), "MPI_Comm_size");
  }
};

inline Layout layout_of(const CodeArgs& args) {
  return {args.numel, args.block, lanes_per_word(args.bits)};
}

inline size_t norm_size(const CodeArgs& args) { return args.dtype == DType::kFloat64 ? 8 : 4; }

// The largest magnitude of each block over all ranks.
inline void reduce_norms(const Reduction& r, const Group& group, MpiMemory& norms) {
  const int64_t blocks = layout_of(r.args).blocks();
  r.parallel_for(0, blocks, [&](int64_t begin, int64_t end) {
    r.kernels->block_max(r.args.dtype, r.x, r.args.numel, r.args.block, norms.data(), begin, end);
  });
  // Bits of floats, as integers: NaN and infinity are the largest of all.
  const MPI_Datatype type = norm_size(r.args) == 8 ? MPI_INT64_T : MPI_INT32_T;
  MPI_Request request;
  norms.lend();
  check_mpi(MPI_Iallreduce(MPI_IN_PLACE, norms.data(), static_cast<int>(blocks), type, MPI_MAX,
                           group.comm, &request),
            "MPI_Iallreduce of norms");
  check_mpi(MPI_Wait(&request, MPI_STATUS_IGNORE), "MPI_Wait for norms");
  norms.take_back();
}

// Codes of tiles [begin, end) to `words`, the words of the whole tensor.
inline void quantize(const Reduction& r, const CodeArgs& args, const Group& group, void* words,
                     int64_t begin, int64_t end) {
  const RankDither dither = rank_dither(r.seed, r.step, r.tensor, static_cast<uint32_t>(group.rank),
                                        static_cast<uint32_t>(group.size), r.correlated);
  r.kernels->quantize(args, r.x, dither.key, dither.offset, words, begin, end);
}

}  // namespace gqsgd
