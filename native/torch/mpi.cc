// The allreduce over MPI as a torch op, in a library of its own: all else works without any MPI.
// The schema stands in hvd_gqsgd/_native/mpi.py. The dispatcher calls this without the GIL.
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <mpi.h>
#include <torch/library.h>

#include <string>

#include "core/lanes.h"
#include "mpi/allreduce.h"
#include "mpi/errors.h"
#include "torch/built_for.h"
#include "torch/checked_args.h"

namespace {

using at::Tensor;

const gqsgd::Kernels* kernels() {
  static const auto table = c10::Dispatcher::singleton()
                                .findSchemaOrThrow("hvd_gqsgd::kernel_table", "")
                                .typed<int64_t()>();
  return reinterpret_cast<const gqsgd::Kernels*>(table.call());
}

void parallel_for(int64_t begin, int64_t end, const std::function<void(int64_t, int64_t)>& run) {
  at::parallel_for(begin, end, gqsgd::grain(gqsgd::kTile), run);
}

void mpi_allreduce(const Tensor& x, Tensor out, int64_t comm, int64_t block_size, int64_t kind,
                   int64_t bits, int64_t levels, int64_t seed, int64_t step, int64_t tensor_id,
                   bool correlated, double scale, int64_t chunk) {
  constexpr int64_t kMostChunk = int64_t{1} << 28;  // MPI counts in ints
  TORCH_CHECK_VALUE(x.is_contiguous(), "the tensor must be contiguous");
  gqsgd::check_buffer(out, "out", x.scalar_type(), x.numel(), x.device());
  const gqsgd::Layout layout = gqsgd::layout_of(x.numel(), block_size, bits);
  TORCH_CHECK_VALUE(chunk >= 1 && chunk <= kMostChunk, "chunk must be from 1 to ", kMostChunk,
                    " elements, got ", chunk);
  TORCH_CHECK_VALUE(layout.numel / layout.block < INT32_MAX, "at most ", INT32_MAX,
                    " norms can be exchanged, got a tensor of ", x.numel(),
                    " elements in blocks of ", block_size);

  const MPI_Comm group = MPI_Comm_f2c(static_cast<MPI_Fint>(comm));
  int size;
  gqsgd::check_mpi(MPI_Comm_size(group, &size), "MPI_Comm_size");
  const gqsgd::CodeArgs args{gqsgd::dtype_of(x, "the tensor"),
                             layout.numel,
                             layout.block,
                             gqsgd::checked_kind(kind, bits, levels),
                             static_cast<int>(bits),
                             static_cast<int32_t>(levels),
                             nullptr};
  const int64_t most = gqsgd::most_ranks(args);
  TORCH_CHECK_VALUE(size <= most, "at most ", most, " ranks can be summed at ", bits, " bits and ",
                    levels, " levels, got ", size);

  gqsgd::Reduction reduction{
      kernels(),
      parallel_for,
      args,
      x.const_data_ptr(),
      out.mutable_data_ptr(),
      static_cast<uint64_t>(seed),
      static_cast<uint64_t>(step),
      static_cast<uint64_t>(tensor_id),
      correlated,
      scale,
  };
  switch (args.kind) {
    case gqsgd::CodeKind::kLinear:
    case gqsgd::CodeKind::kNearest:
      return gqsgd::linear_allreduce(reduction, chunk, group);
    case gqsgd::CodeKind::kExponential:
      return gqsgd::exponential_allreduce(reduction, group);
  }
}

// Of the MPI that this library calls.
std::string mpi_library_version() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING];
  int length;
  MPI_Get_library_version(text, &length);
  return {text, static_cast<size_t>(length)};
}

}  // namespace

TORCH_LIBRARY_IMPL(hvd_gqsgd, CPU, m) { m.impl("mpi_allreduce", &mpi_allreduce); }

TORCH_LIBRARY_IMPL(hvd_gqsgd, CatchAll, m) { m.impl("mpi_library_version", &mpi_library_version); }
