// In place of native/torch/cuda_device.h.
#pragma once

#include <ATen/core/Tensor.h>

#include "cuda/kernels.h"

namespace gqsgd {

struct Emulated {
  template <class F>
  static void run(const at::Tensor&, F f) {
    f(CudaKernels{nullptr});
  }
  template <class F>
  static void run(const at::Tensor&, int64_t begin, int64_t end, int64_t, F f) {
    f(CudaKernels{nullptr}, begin, end);
  }
  template <class F>
  static void run(at::Device, F f) {
    f(CudaKernels{nullptr});
  }
};

}  // namespace gqsgd
