// The kernels on the CPU as torch ops.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "torch/block_ops.h"
#include "torch/bucket_ops.h"
#include "torch/built_for.h"
#include "torch/checked_ops.h"

namespace {

using at::Tensor;
using gqsgd::Kernels;

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

struct Cpu {
  template <class F>
  static void run(const Tensor&, int64_t begin, int64_t end, int64_t grain, F f) {
    const Kernels& kernels = *active_kernels();
    at::parallel_for(begin, end, grain,
                     [&](int64_t first, int64_t last) { f(kernels, first, last); });
  }
  template <class F>
  static void run(const Tensor&, F f) {
    f(*active_kernels());
  }
};

// Parts are added up in their order, however many threads made them.
void sum_of_squares(const Tensor& x, Tensor sum) {
  constexpr int64_t kGrain = 16;
  const gqsgd::DType dtype = gqsgd::check_sum_of_squares(x, sum);
  const Kernels* kernels = active_kernels();
  const auto* data = static_cast<const char*>(x.const_data_ptr());
  std::vector<double> parts(gqsgd::ceil_div(x.numel(), gqsgd::kSquaresPart));
  at::parallel_for(0, static_cast<int64_t>(parts.size()), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * gqsgd::kSquaresPart;
      parts[part] = kernels->sum_of_squares(dtype, data + first * x.element_size(),
                                            std::min(gqsgd::kSquaresPart, x.numel() - first));
    }
  });
  *sum.mutable_data_ptr<double>() = std::accumulate(parts.begin(), parts.end(), 0.0);
}

std::vector<int64_t> storage_use_counts(at::TensorList tensors) {
  std::vector<int64_t> counts;
  counts.reserve(tensors.size());
  for (const Tensor& tensor : tensors) {
    counts.push_back(static_cast<int64_t>(tensor.storage().use_count()));
  }
  return counts;
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
  gqsgd::CheckedOps<Cpu>::register_all(m);
  gqsgd::BucketOps<Cpu>::register_all(m);
  gqsgd::BlockOps<Cpu>::register_all(m);
  m.impl("sum_of_squares", &sum_of_squares);
}

TORCH_LIBRARY_IMPL(hvd_gqsgd, CompositeExplicitAutograd, m) {
  m.impl("storage_use_counts", &storage_use_counts);
}

TORCH_LIBRARY_IMPL(hvd_gqsgd, CatchAll, m) {
  m.impl("kernel_table", &kernel_table);
  m.impl("instruction_sets", &instruction_sets);
  m.impl("instruction_set", &instruction_set);
  m.impl("use_instruction_set", &use_instruction_set);
}
