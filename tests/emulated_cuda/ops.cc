// The ops of cuda_bindings.cc on emulated CUDA, for tensors on the CPU.
#include "checked_ops.h"
#include "cuda/kernels.h"

namespace {

using at::Tensor;

struct Emulated {
  template <class F>
  static void run(const Tensor&, F f) {
    f(gqsgd::CudaKernels{nullptr});
  }
  template <class F>
  static void run(const Tensor&, int64_t begin, int64_t end, int64_t, F f) {
    f(gqsgd::CudaKernels{nullptr}, begin, end);
  }
};

void sum_of_squares(const Tensor& x, Tensor sum) {
  const gqsgd::DType dtype = gqsgd::check_sum_of_squares(x, sum);
  std::vector<double> parts(gqsgd::ceil_div(x.numel(), gqsgd::kSquaresPart));
  gqsgd::CudaKernels{nullptr}.sum_of_squares(dtype, x.const_data_ptr(), x.numel(), parts.data(),
                                             sum.mutable_data_ptr<double>());
}

}  // namespace

TORCH_LIBRARY_IMPL(hvd_gqsgd_emulated, CPU, m) {
  gqsgd::CheckedOps<Emulated>::register_all(m);
  m.impl("sum_of_squares", &sum_of_squares);
}
