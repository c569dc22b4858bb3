// The kernels on a GPU as torch ops, in a library of its own: all else works without CUDA. They are
// enqueued on the current stream, and the host waits for nothing.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "checked_ops.h"
#include "cuda/kernels.h"

namespace {

using at::Tensor;

struct Cuda {
  template <class F>
  static void run(const Tensor& on, F f) {
    const c10::cuda::CUDAGuard guard(on.device());
    f(gqsgd::CudaKernels{c10::cuda::getCurrentCUDAStream()});
  }
  template <class F>
  static void run(const Tensor& on, int64_t begin, int64_t end, int64_t, F f) {
    run(on, [&](const gqsgd::CudaKernels& kernels) { f(kernels, begin, end); });
  }
};

void sum_of_squares(const Tensor& x, Tensor sum) {
  const gqsgd::DType dtype = gqsgd::check_sum_of_squares(x, sum);
  const Tensor parts = at::empty({gqsgd::ceil_div(x.numel(), gqsgd::kSquaresPart)}, sum.options());
  Cuda::run(x, [&](const gqsgd::CudaKernels& kernels) {
    kernels.sum_of_squares(dtype, x.const_data_ptr(), x.numel(), parts.mutable_data_ptr<double>(),
                           sum.mutable_data_ptr<double>());
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(hvd_gqsgd, CUDA, m) {
  gqsgd::CheckedOps<Cuda>::register_all(m);
  m.impl("sum_of_squares", &sum_of_squares);
}
