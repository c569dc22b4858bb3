// The kernels as torch ops. This file, mpi_bindings.cc and tensors.h alone know torch. Schemas and
// fake kernels stand in hvd_gqsgd/ops.py. The dispatcher calls these without the GIL.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "gqsgd/hash.h"
#include "gqsgd/lanes.h"
#include "tensors.h"

namespace {

using at::Tensor;
using gqsgd::check_buffer;
using gqsgd::CodeArgs;
using gqsgd::DType;
using gqsgd::dtype_of;
using gqsgd::grain;
using gqsgd::Kernels;
using gqsgd::Layout;
using gqsgd::layout_of;
using gqsgd::MeansLayout;

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

at::ScalarType norm_dtype(DType dtype) { return dtype == DType::kFloat64 ? at::kLong : at::kInt; }

// Of the types that have such norms, the one of the arithmetic.
DType arithmetic_of(const Tensor& norms) {
  return norms.scalar_type() == at::kLong ? DType::kFloat64 : DType::kFloat32;
}

void check_geometry(const Tensor& x, int64_t block_size) {
  TORCH_CHECK_VALUE(x.is_contiguous(), "the tensor must be contiguous");
  TORCH_CHECK_VALUE(block_size >= 1, "block_size must be at least 1, got ", block_size);
}

at::ScalarType word_dtype(int64_t bits) {
  return gqsgd::fits_int32(static_cast<int>(bits)) ? at::kInt : at::kLong;
}

// Checks all but the values in the buffers, so that no kernel can leave them.
CodeArgs code_args(DType dtype, const Layout& layout, const Tensor& norms, int64_t bits,
                   int64_t levels) {
  const int64_t most = ((int64_t{1} << bits) - 1) / 2;
  TORCH_CHECK_VALUE(levels >= 0 && levels <= most, "levels must be from 1 to ", most, " for ", bits,
                    " bits, or 0 for exponential dithering, got ", levels);
  TORCH_CHECK_VALUE(levels > 0 || bits == 4 || bits == 8,
                    "exponential dithering has 4 or 8 bits, got ", bits);
  check_buffer(norms, "norms", norm_dtype(dtype), layout.blocks());
  return {dtype,
          layout.numel,
          layout.block,
          static_cast<int>(bits),
          static_cast<int32_t>(levels),
          norms.const_data_ptr()};
}

CodeArgs code_args(const Tensor& x, const Tensor& norms, const Tensor& words, const Layout& layout,
                   int64_t bits, int64_t levels) {
  TORCH_CHECK_VALUE(x.is_contiguous(), "the tensor must be contiguous");
  const CodeArgs args = code_args(dtype_of(x, "the tensor"), layout, norms, bits, levels);
  check_buffer(words, "words", word_dtype(bits), layout.words());
  return args;
}

void check_tiles(const Layout& layout, int64_t first, int64_t last) {
  TORCH_CHECK_VALUE(0 <= first && first <= last && last <= layout.tiles(),
                    "tiles must be within 0 to ", layout.tiles(), ", got ", first, " to ", last);
}

// The means of tiles [first, last) as a buffer of the wider one of norms and words.
void check_means(const Tensor& means, const Layout& layout, DType dtype, int64_t bits,
                 int64_t first, int64_t last) {
  const int64_t norm_size = at::elementSize(norm_dtype(dtype));
  const int64_t word_size = at::elementSize(word_dtype(bits));
  const MeansLayout at{layout, word_size, std::max(norm_size, word_size)};
  check_buffer(means, "means", at.unit == 8 ? at::kLong : at::kInt,
               at.begin(last) - at.begin(first));
}

void block_max(const Tensor& x, int64_t block_size, Tensor norms) {
  check_geometry(x, block_size);
  const DType dtype = dtype_of(x, "the tensor");
  const int64_t blocks = gqsgd::ceil_div(x.numel(), block_size);
  check_buffer(norms, "norms", norm_dtype(dtype), blocks);
  const Kernels* kernels = active_kernels();
  at::parallel_for(0, blocks, grain(block_size), [&](int64_t begin, int64_t end) {
    kernels->block_max(dtype, x.const_data_ptr(), x.numel(), block_size, norms.mutable_data_ptr(),
                       begin, end);
  });
}

void block_squares(const Tensor& x, const Tensor& norms, Tensor squares, int64_t block_size) {
  check_geometry(x, block_size);
  const DType dtype = dtype_of(x, "the tensor");
  const Layout layout{x.numel(), block_size, 1};
  check_buffer(norms, "norms", norm_dtype(dtype), layout.blocks());
  check_buffer(squares, "squares", at::kLong, layout.blocks());
  const CodeArgs args{dtype, x.numel(), block_size, 0, 0, norms.const_data_ptr()};
  const Kernels* kernels = active_kernels();
  at::parallel_for(0, layout.blocks(), grain(block_size), [&](int64_t begin, int64_t end) {
    kernels->block_squares(args, x.const_data_ptr(), squares.mutable_data_ptr<int64_t>(), begin,
                           end);
  });
}

void l2_norms(Tensor norms, const Tensor& squares) {
  TORCH_CHECK_TYPE(norms.scalar_type() == at::kInt || norms.scalar_type() == at::kLong,
                   "norms must be Int or Long, got ", norms.scalar_type());
  check_buffer(norms, "norms", norms.scalar_type(), norms.numel());
  check_buffer(squares, "squares", at::kLong, norms.numel());
  const DType dtype = arithmetic_of(norms);
  active_kernels().load()->l2_norms(dtype, norms.mutable_data_ptr(),
                                    squares.const_data_ptr<int64_t>(), 0, norms.numel());
}

void quantize(const Tensor& x, const Tensor& norms, Tensor words, int64_t block_size, int64_t bits,
              int64_t levels, int64_t seed, int64_t step, int64_t tensor_id, int64_t rank,
              int64_t world_size, bool correlated) {
  TORCH_CHECK_VALUE(0 <= rank && rank < world_size, "rank must be from 0 to ", world_size - 1,
                    ", got ", rank);
  TORCH_CHECK_VALUE(world_size <= INT32_MAX, "world_size must be at most ", INT32_MAX, ", got ",
                    world_size);
  const Layout layout = layout_of(x.numel(), block_size, bits);
  const CodeArgs args = code_args(x, norms, words, layout, bits, levels);
  const gqsgd::RankDither dither =
      gqsgd::rank_dither(seed, step, tensor_id, static_cast<uint32_t>(rank),
                         static_cast<uint32_t>(world_size), correlated);
  const Kernels* kernels = active_kernels();
  at::parallel_for(0, layout.tiles(), grain(gqsgd::kTile), [&](int64_t begin, int64_t end) {
    kernels->quantize(args, x.const_data_ptr(), dither.key, dither.offset, words.mutable_data_ptr(),
                      begin, end);
  });
}

void dequantize(const Tensor& words, const Tensor& norms, Tensor out, int64_t block_size,
                int64_t bits, int64_t levels, int64_t contributors, double scale) {
  const Layout layout = layout_of(out.numel(), block_size, bits);
  TORCH_CHECK_VALUE(levels >= 1, "levels must be at least 1, got ", levels);
  const CodeArgs args = code_args(out, norms, words, layout, bits, levels);
  const int64_t most = gqsgd::most_ranks(bits, levels);
  TORCH_CHECK_VALUE(contributors >= 1 && contributors <= most, "contributors must be from 1 to ",
                    most, " for ", bits, " bits and ", levels, " levels, got ", contributors);
  const Kernels* kernels = active_kernels();
  at::parallel_for(0, layout.tiles(), grain(gqsgd::kTile), [&](int64_t begin, int64_t end) {
    kernels->dequantize(args, words.const_data_ptr(), contributors, scale, out.mutable_data_ptr(),
                        begin, end);
  });
}

void requantize(const Tensor& received, const Tensor& norms, Tensor means, int64_t numel,
                int64_t block_size, int64_t bits, int64_t levels, int64_t first, int64_t last,
                int64_t seed, int64_t step, int64_t tensor_id) {
  const Layout layout = layout_of(numel, block_size, bits);
  const DType dtype = arithmetic_of(norms);
  const CodeArgs args = code_args(dtype, layout, norms, bits, levels);
  check_tiles(layout, first, last);
  const int64_t words = layout.word(last) - layout.word(first);
  TORCH_CHECK_TYPE(received.scalar_type() == word_dtype(bits), "received must be ",
                   word_dtype(bits), ", got ", received.scalar_type());
  TORCH_CHECK_VALUE(received.dim() == 2 && received.size(0) >= 1 && received.size(1) == words &&
                        (words <= 1 || received.stride(1) == 1),
                    "received must be a row of ", words, " words for each rank, got ",
                    received.sizes(), " with strides ", received.strides());
  // Sums of linear codes are kept in 32 bits, and what comes in may be anything.
  TORCH_CHECK_VALUE(received.size(0) <= 32768, "received must be from at most 32768 ranks, got ",
                    received.size(0));
  check_means(means, layout, dtype, bits, first, last);
  const uint64_t key = gqsgd::dither_key(seed, step, tensor_id, gqsgd::kRequantizeStream);
  const gqsgd::Received pieces{received.const_data_ptr(), received.size(0), received.stride(0)};
  const Kernels* kernels = active_kernels();
  at::parallel_for(
      first, last, grain(gqsgd::kTile * received.size(0)), [&](int64_t begin, int64_t end) {
        kernels->requantize(args, pieces, key, means.mutable_data_ptr(), first, begin, end);
      });
}

void dequantize_means(const Tensor& means, const Tensor& norms, Tensor out, int64_t block_size,
                      int64_t bits, int64_t levels, int64_t first, int64_t last, double scale) {
  check_geometry(out, block_size);
  const Layout layout = layout_of(out.numel(), block_size, bits);
  const DType dtype = dtype_of(out, "the tensor");
  const CodeArgs args = code_args(dtype, layout, norms, bits, levels);
  check_tiles(layout, first, last);
  check_means(means, layout, dtype, bits, first, last);
  const Kernels* kernels = active_kernels();
  at::parallel_for(first, last, grain(gqsgd::kTile), [&](int64_t begin, int64_t end) {
    kernels->dequantize_means(args, means.const_data_ptr(), scale, out.mutable_data_ptr(), first,
                              begin, end);
  });
}

void combine(const Tensor& from, Tensor to, int64_t bits, int64_t key) {
  TORCH_CHECK_VALUE(bits == 4 || bits == 8, "exponential dithering has 4 or 8 bits, got ", bits);
  check_buffer(from, "from", at::kByte, from.numel());
  check_buffer(to, "to", at::kByte, from.numel());
  active_kernels().load()->combine(static_cast<int>(bits), from.const_data_ptr(),
                                   to.mutable_data_ptr(), static_cast<uint64_t>(key), to.numel());
}

// Parts are added up in their order, however many threads made them.
double sum_of_squares(const Tensor& x) {
  constexpr int64_t kPart = 65536;
  check_geometry(x, 1);
  const DType dtype = dtype_of(x, "the tensor");
  const Kernels* kernels = active_kernels();
  const auto* data = static_cast<const char*>(x.const_data_ptr());
  std::vector<double> parts(gqsgd::ceil_div(x.numel(), kPart));
  at::parallel_for(0, static_cast<int64_t>(parts.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      parts[part] = kernels->sum_of_squares(dtype, data + part * kPart * x.element_size(),
                                            std::min(kPart, x.numel() - part * kPart));
    }
  });
  return std::accumulate(parts.begin(), parts.end(), 0.0);
}

int64_t storage_use_count(const Tensor& tensor) {
  return static_cast<int64_t>(tensor.storage().use_count());
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* table : kernel_tables()) names.emplace_back(table->name);
  return names;
}

// For the native parts that are libraries of their own: the kernels in use, as a pointer.
int64_t kernel_table() { return reinterpret_cast<int64_t>(active_kernels().load()); }

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
  m.impl("block_squares", &block_squares);
  m.impl("l2_norms", &l2_norms);
  m.impl("requantize", &requantize);
  m.impl("dequantize_means", &dequantize_means);
  m.impl("combine", &combine);
  m.impl("sum_of_squares", &sum_of_squares);
}

TORCH_LIBRARY_IMPL(hvd_gqsgd, CompositeExplicitAutograd, m) {
  m.impl("storage_use_count", &storage_use_count);
}

TORCH_LIBRARY_IMPL(hvd_gqsgd, CatchAll, m) {
  m.impl("kernel_table", &kernel_table);
  m.impl("instruction_sets", &instruction_sets);
  m.impl("instruction_set", &instruction_set);
  m.impl("use_instruction_set", &use_instruction_set);
}
