// The ops of native/torch/cuda.cc on emulated CUDA, for tensors on the CPU.
#include "emulated_device.h"
#include "torch/block_ops.h"
#include "torch/checked_ops.h"

namespace {

using at::Tensor;

void sum_of_squares(const Tensor& x, Tensor sum) {
  const gqsgd::DType dtype = gqsgd::check_sum_of_squares(x, sum);
  std::vector<double> parts(gqsgd::ceil_div(x.numel(), gqsgd::kSquaresPart));
  gqsgd::CudaKernels{nullptr}.sum_of_squares(dtype, x.const_data_ptr(), x.numel(), parts.data(),
                                             sum.mutable_data_ptr<double>());
}

}  // namespace

TORCH_LIBRARY_IMPL(hvd_gqsgd_emulated, CPU, m) {
  gqsgd::CheckedOps<gqsgd::Emulated>::register_all(m);
  gqsgd::BlockOps<gqsgd::Emulated>::register_all(m);
  m.impl("sum_of_squares", &sum_of_squares);
}
