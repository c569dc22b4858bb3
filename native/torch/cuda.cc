// The kernels on a GPU as torch ops, in a library of its own: all else works without CUDA. They are
// enqueued on the current stream, and the host waits for nothing.
#include <ATen/ops/empty.h>

#include "torch/block_ops.h"
#include "torch/bucket_ops.h"
#include "torch/built_for.h"
#include "torch/checked_ops.h"
#include "torch/cuda_device.h"

namespace {

using at::Tensor;

void sum_of_squares(const Tensor& x, Tensor sum) {
  const gqsgd::DType dtype = gqsgd::check_sum_of_squares(x, sum);
  const Tensor parts = at::empty({gqsgd::ceil_div(x.numel(), gqsgd::kSquaresPart)}, sum.options());
  gqsgd::Cuda::run(x, [&](const gqsgd::CudaKernels& kernels) {
    kernels.sum_of_squares(dtype, x.const_data_ptr(), x.numel(), parts.mutable_data_ptr<double>(),
                           sum.mutable_data_ptr<double>());
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(hvd_gqsgd, CUDA, m) {
  gqsgd::CheckedOps<gqsgd::Cuda>::register_all(m);
  gqsgd::BucketOps<gqsgd::Cuda>::register_all(m);
  gqsgd::BlockOps<gqsgd::Cuda>::register_all(m);
  m.impl("sum_of_squares", &sum_of_squares);
}
