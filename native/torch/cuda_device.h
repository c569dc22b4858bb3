// The GPU of a tensor, for CheckedOps and NcclCommunicator.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/kernels.h"

namespace gqsgd {

// Kernels are enqueued on the stream that is the current one.
struct Cuda {
  template <class F>
  static void run(const at::Tensor& on, F f) {
    run(on.device(), f);
  }
  template <class F>
  static void run(const at::Tensor& on, int64_t begin, int64_t end, int64_t, F f) {
    run(on.device(), [&](const CudaKernels& kernels) { f(kernels, begin, end); });
  }
  template <class F>
  static void run(at::Device device, F f) {
    const c10::cuda::CUDAGuard guard(device);
    f(CudaKernels{c10::cuda::getCurrentCUDAStream(device.index())});
  }
};

}  // namespace gqsgd
