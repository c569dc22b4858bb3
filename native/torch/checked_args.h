// Checks of arguments that all bindings share.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "core/args.h"
#include "core/lanes.h"

namespace gqsgd {

using at::Tensor;

inline DType dtype_of(const Tensor& x, const char* role) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      TORCH_CHECK_TYPE(false, role, " must be float16, bfloat16, float32 or float64, got ",
                       x.scalar_type());
  }
}

inline void check_buffer(const Tensor& buffer, const char* role, at::ScalarType dtype,
                         int64_t numel, at::Device device) {
  TORCH_CHECK_TYPE(buffer.scalar_type() == dtype, role, " must be ", dtype, ", got ",
                   buffer.scalar_type());
  TORCH_CHECK_VALUE(buffer.is_contiguous(), role, " must be contiguous");
  TORCH_CHECK_VALUE(buffer.numel() == numel, role, " must have ", numel, " elements, got ",
                    buffer.numel());
  TORCH_CHECK_VALUE(buffer.device() == device, role, " must be on ", device, ", got one on ",
                    buffer.device());
}

// About a quarter of a megabyte of float32 for each thread at the least.
inline int64_t grain(int64_t elements_each) {
  return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, elements_each));
}

inline Layout layout_of(int64_t numel, int64_t block_size, int64_t bits) {
  TORCH_CHECK_VALUE(numel >= 0, "numel must be at least 0, got ", numel);
  TORCH_CHECK_VALUE(block_size >= 1, "block_size must be at least 1, got ", block_size);
  TORCH_CHECK_VALUE(bits >= 2 && bits <= 16, "bits must be from 2 to 16, got ", bits);
  return {numel, block_size, lanes_per_word(static_cast<int>(bits))};
}

// Numbers of ranks whose linear codes fit into lanes: 2^bits - 1 over the codes that each one has.
inline int64_t most_ranks(int64_t bits, int64_t levels) {
  return ((int64_t{1} << bits) - 1) / (2 * levels);
}

}  // namespace gqsgd
