// Launches, checked. CUDA's errors come as exceptions with its own text.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/config.h"

namespace gqsgd {

class CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

inline void check_cuda(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  throw CudaError(std::string(what) + " failed: " + cudaGetErrorString(code));
}

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // of a block, as CUDA calls it: here that is a part of a tensor

// Threads x * y, of which those with one y share a tile.
inline dim3 threads_for(int64_t x) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(std::max<int64_t>(1, kThreads / x)));
}

// At most so many at once: kernels loop over what is left.
inline unsigned grid_for(int64_t work, int64_t each) {
  return static_cast<unsigned>(std::min<int64_t>((work + each - 1) / each, INT32_MAX));
}

template <class... Parameters, class... Arguments>
void launch(cudaStream_t stream, unsigned grid, dim3 threads, void (*kernel)(Parameters...),
            Arguments... arguments) {
  if (grid == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = threads;
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), "a kernel launch");
}

}  // namespace gqsgd
