// The kernels as torch ops: the only file that knows torch. Schemas and fake kernels stand in
// hvd_gqsgd/ops.py. The dispatcher calls these without the GIL.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "gqsgd/hash.h"
#include "gqsgd/lanes.h"

namespace {

using at::Tensor;
using gqsgd::DType;
using gqsgd::Kernels;
using gqsgd::Layout;

std::vector<const Kernels*> kernel_tables() {
  const Kernels* tables[3];
  const int count = gqsgd::available_kernels(tables);
  return {tables, tables + count};
}

// Every table gives the same bits, so choosing one is for tests and benchmarks alone.
std::atomic<const Kernels*>& active_kernels() {
  static std::atomic<const Kernels*> active{kernel_tables().back()};
  return active;
}

DType dtype_of(const Tensor& x, const char* role) {
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

void check_buffer(const Tensor& buffer, const char* role, at::ScalarType dtype, int64_t numel) {
  TORCH_CHECK_TYPE(buffer.scalar_type() == dtype, role, " must be ", dtype, ", got ",
                   buffer.scalar_type());
  TORCH_CHECK_VALUE(buffer.is_contiguous(), role, " must be contiguous");
  TORCH_CHECK_VALUE(buffer.numel() == numel, role, " must have ", numel, " elements, got ",
                    buffer.numel());
}

at::ScalarType norm_dtype(DType dtype) { return dtype == DType::kFloat64 ? at::kLong : at::kInt; }

// Checks all but the values in the buffers, so that no kernel can leave them.
gqsgd::LinearArgs linear_args(const Tensor& x, const Tensor& norms, const Tensor& words,
                              int64_t block_size, int64_t bits, int64_t levels, Layout* layout) {
  TORCH_CHECK_VALUE(x.is_contiguous(), "the tensor must be contiguous");
  TORCH_CHECK_VALUE(block_size >= 1, "block_size must be at least 1, got ", block_size);
  TORCH_CHECK_VALUE(bits >= 2 && bits <= 16, "bits must be from 2 to 16, got ", bits);
  TORCH_CHECK_VALUE(levels >= 1 && levels <= ((int64_t{1} << bits) - 1) / 2,
                    "levels must be from 1 to ", ((int64_t{1} << bits) - 1) / 2, " for ", bits,
                    " bits, got ", levels);
  const DType dtype = dtype_of(x, "the tensor");
  *layout = {x.numel(), block_size, gqsgd::lanes_per_word(static_cast<int>(bits))};
  check_buffer(norms, "norms", norm_dtype(dtype), layout->blocks());
  check_buffer(words, "words", gqsgd::fits_int32(static_cast<int>(bits)) ? at::kInt : at::kLong,
               layout->words());
  return {dtype,
          x.numel(),
          block_size,
          static_cast<int>(bits),
          static_cast<int32_t>(levels),
          norms.const_data_ptr()};
}

// About a quarter of a megabyte of float32 for each thread at the least.
int64_t grain(int64_t elements_each) {
  return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, elements_each));
}

void block_max(const Tensor& x, int64_t block_size, Tensor norms) {
  TORCH_CHECK_VALUE(x.is_contiguous(), "the tensor must be contiguous");
  TORCH_CHECK_VALUE(block_size >= 1, "block_size must be at least 1, got ", block_size);
  const DType dtype = dtype_of(x, "the tensor");
  const int64_t blocks = gqsgd::ceil_div(x.numel(), block_size);
  check_buffer(norms, "norms", norm_dtype(dtype), blocks);
  const Kernels* kernels = active_kernels();
  at::parallel_for(0, blocks, grain(block_size), [&](int64_t begin, int64_t end) {
    kernels->block_max(dtype, x.const_data_ptr(), x.numel(), block_size, norms.mutable_data_ptr(),
                       begin, end);
  });
}

void quantize(const Tensor& x, const Tensor& norms, Tensor words, int64_t block_size, int64_t bits,
              int64_t levels, int64_t seed, int64_t step, int64_t tensor_id, int64_t rank,
              int64_t world_size, bool correlated) {
  TORCH_CHECK_VALUE(0 <= rank && rank < world_size, "rank must be from 0 to ", world_size - 1,
                    ", got ", rank);
  Layout layout;
  const auto args = linear_args(x, norms, words, block_size, bits, levels, &layout);
  const uint64_t key = gqsgd::dither_key(seed, step, tensor_id, correlated ? 0 : 1 + rank);
  const uint32_t offset = correlated ? gqsgd::rank_offset(static_cast<uint32_t>(rank),
                                                          static_cast<uint32_t>(world_size))
                                     : 0;
  const Kernels* kernels = active_kernels();
  at::parallel_for(0, layout.tiles(), grain(gqsgd::kTile), [&](int64_t begin, int64_t end) {
    kernels->quantize(args, x.const_data_ptr(), key, offset, words.mutable_data_ptr(), begin, end);
  });
}

void dequantize(const Tensor& words, const Tensor& norms, Tensor out, int64_t block_size,
                int64_t bits, int64_t levels, int64_t contributors, double scale) {
  Layout layout;
  const auto args = linear_args(out, norms, words, block_size, bits, levels, &layout);
  TORCH_CHECK_VALUE(contributors >= 1 && contributors <= ((int64_t{1} << bits) - 1) / (2 * levels),
                    "contributors must be from 1 to ", ((int64_t{1} << bits) - 1) / (2 * levels),
                    " for ", bits, " bits and ", levels, " levels, got ", contributors);
  const Kernels* kernels = active_kernels();
  at::parallel_for(0, layout.tiles(), grain(gqsgd::kTile), [&](int64_t begin, int64_t end) {
    kernels->dequantize(args, words.const_data_ptr(), contributors, scale, out.mutable_data_ptr(),
                        begin, end);
  });
}

int64_t storage_use_count(const Tensor& tensor) {
  return static_cast<int64_t>(tensor.storage().use_count());
}

// What this library was built from. A part that is added names itself here.
std::vector<std::string> parts() { return {"cpu"}; }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* table : kernel_tables()) names.emplace_back(table->name);
  return names;
}

std::string instruction_set() { return active_kernels().load()->name; }

void use_instruction_set(std::string name) {
  for (const Kernels* table : kernel_tables()) {
    if (name == table->name) {
      active_kernels() = table;
      return;
    }
  }
  TORCH_CHECK_VALUE(false, "no kernels for ", name, " here; this processor and build have ",
                    instruction_sets());
}

}  // namespace

TORCH_LIBRARY_IMPL(hvd_gqsgd, CPU, m) {
  m.impl("block_max", &block_max);
  m.impl("quantize", &quantize);
  m.impl("dequantize", &dequantize);
}

TORCH_LIBRARY_IMPL(hvd_gqsgd, CompositeExplicitAutograd, m) {
  m.impl("storage_use_count", &storage_use_count);
}

TORCH_LIBRARY_IMPL(hvd_gqsgd, CatchAll, m) {
  m.impl("parts", &parts);
  m.impl("instruction_sets", &instruction_sets);
  m.impl("instruction_set", &instruction_set);
  m.impl("use_instruction_set", &use_instruction_set);
}
