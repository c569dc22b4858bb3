// The kernels on all tensors of a bucket in one call: for a small tensor, to call an operator from
// Python takes longer than its kernel. Each is the operator of checked_ops.h on one tensor after
// the other, which checks all arguments; here, that offsets are within the messages.
#pragma once

#include <ATen/core/List.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "torch/checked_ops.h"

namespace gqsgd {

// Elements that share a norm; without a block size all of a tensor.
inline int64_t block_of(int64_t numel, std::optional<int64_t> block_size) {
  const int64_t block = block_size.value_or(std::max<int64_t>(numel, 1));
  TORCH_CHECK_VALUE(block >= 1, "block_size must be at least 1, got ", block);
  return block;
}

// `length` elements of a message from `start` on.
inline Tensor piece(const Tensor& message, const char* role, int64_t start, int64_t length) {
  TORCH_CHECK_VALUE(message.dim() == 1, role, " must have one dimension, got ", message.dim());
  TORCH_CHECK_VALUE(0 <= start && 0 <= length && start <= message.numel() - length, role, " has ",
                    message.numel(), " elements, and a tensor's ", length, " begin at ", start);
  return message.narrow(0, start, length);
}

inline void check_one_each(at::IntArrayRef numbers, const char* role, size_t tensors) {
  TORCH_CHECK_VALUE(numbers.size() == tensors, role, " must have a number for each of ", tensors,
                    " tensors, got ", numbers.size());
}

// Runs of tiles of a bucket's tensors, four numbers each: the tensor, its first tile, the one after
// its last, and the offset of the run in the means.
struct Runs {
  static constexpr size_t kNumbers = 4;

  at::IntArrayRef numbers;
  size_t tensors;

  template <class F>
  void each(F f) const {
    TORCH_CHECK_VALUE(numbers.size() % kNumbers == 0, "runs must be 4 numbers each, got ",
                      numbers.size());
    for (size_t i = 0; i < numbers.size(); i += kNumbers) {
      const int64_t tensor = numbers[i];
      TORCH_CHECK_VALUE(0 <= tensor && tensor < static_cast<int64_t>(tensors),
                        "a run must be of one of ", tensors, " tensors, got ", tensor);
      f(static_cast<size_t>(tensor), numbers[i + 1], numbers[i + 2], numbers[i + 3]);
    }
  }
};

template <class Device>
struct BucketOps {
  using Ops = CheckedOps<Device>;

  static void block_max_each(at::TensorList xs, std::optional<int64_t> block_size, Tensor norms) {
    int64_t at = 0;
    for (const Tensor& x : xs) {
      const int64_t block = block_of(x.numel(), block_size), count = ceil_div(x.numel(), block);
      Ops::block_max(x, block, piece(norms, "norms", at, count));
      at += count;
    }
  }

  static void quantize_each(at::TensorList xs, const Tensor& norms, Tensor words,
                            std::optional<int64_t> block_size, int64_t kind, int64_t bits,
                            int64_t levels, int64_t seed, int64_t step, at::IntArrayRef tensor_ids,
                            int64_t rank, int64_t world_size, bool correlated) {
    check_one_each(tensor_ids, "tensor_ids", xs.size());
    int64_t norm = 0, word = 0;
    for (size_t i = 0; i < xs.size(); ++i) {
      const int64_t block = block_of(xs[i].numel(), block_size);
      const Layout layout = layout_of(xs[i].numel(), block, bits);
      Ops::quantize(xs[i], piece(norms, "norms", norm, layout.blocks()),
                    piece(words, "words", word, layout.words()), block, kind, bits, levels, seed,
                    step, tensor_ids[i], rank, world_size, correlated);
      norm += layout.blocks();
      word += layout.words();
    }
  }

  static void dequantize_each(const Tensor& words, const Tensor& norms, at::TensorList outs,
                              at::IntArrayRef word_starts, at::IntArrayRef norm_starts,
                              std::optional<int64_t> block_size, int64_t kind, int64_t bits,
                              int64_t levels, int64_t contributors, double scale) {
    check_one_each(word_starts, "word_starts", outs.size());
    check_one_each(norm_starts, "norm_starts", outs.size());
    for (size_t i = 0; i < outs.size(); ++i) {
      const int64_t block = block_of(outs[i].numel(), block_size);
      const Layout layout = layout_of(outs[i].numel(), block, bits);
      Ops::dequantize(piece(words, "words", word_starts[i], layout.words()),
                      piece(norms, "norms", norm_starts[i], layout.blocks()), outs[i], block, kind,
                      bits, levels, contributors, scale);
    }
  }

  // `received` has the words of the runs one behind the other, and `means` their means from `begin`
  // on.
  static void requantize_each(const Tensor& received, const Tensor& norms, Tensor means,
                              at::IntArrayRef numels, at::IntArrayRef norm_starts,
                              at::IntArrayRef runs, int64_t begin,
                              std::optional<int64_t> block_size, int64_t kind, int64_t bits,
                              int64_t levels, int64_t seed, int64_t step,
                              at::IntArrayRef tensor_ids) {
    check_one_each(norm_starts, "norm_starts", numels.size());
    check_one_each(tensor_ids, "tensor_ids", numels.size());
    TORCH_CHECK_VALUE(received.dim() == 2, "received must have a row for each rank, got ",
                      received.dim(), " dimensions");
    int64_t word = 0;
    Runs{runs, numels.size()}.each([&](size_t i, int64_t first, int64_t last, int64_t mean) {
      const int64_t block = block_of(numels[i], block_size);
      const Layout layout = layout_of(numels[i], block, bits);
      const int64_t length = means_of(layout, arithmetic_of(norms), bits, first, last);
      const int64_t words = layout.word(last) - layout.word(first);
      TORCH_CHECK_VALUE(words <= received.size(1) - word, "received has ", received.size(1),
                        " words of each rank, and the tiles have more");
      Ops::requantize(received.narrow(1, word, words),
                      piece(norms, "norms", norm_starts[i], layout.blocks()),
                      piece(means, "means", mean - begin, length), numels[i], block, kind, bits,
                      levels, first, last, seed, step, tensor_ids[i]);
      word += words;
    });
  }

  static void dequantize_means_each(const Tensor& means, const Tensor& norms, at::TensorList outs,
                                    at::IntArrayRef norm_starts, at::IntArrayRef runs,
                                    std::optional<int64_t> block_size, int64_t kind, int64_t bits,
                                    int64_t levels, double scale) {
    check_one_each(norm_starts, "norm_starts", outs.size());
    Runs{runs, outs.size()}.each([&](size_t i, int64_t first, int64_t last, int64_t mean) {
      const int64_t block = block_of(outs[i].numel(), block_size);
      const Layout layout = layout_of(outs[i].numel(), block, bits);
      const int64_t length = means_of(layout, arithmetic_of(norms), bits, first, last);
      Ops::dequantize_means(piece(means, "means", mean, length),
                            piece(norms, "norms", norm_starts[i], layout.blocks()), outs[i], block,
                            kind, bits, levels, first, last, scale);
    });
  }

  static void register_all(torch::Library& m) {
    m.impl("block_max_each", &block_max_each);
    m.impl("quantize_each", &quantize_each);
    m.impl("dequantize_each", &dequantize_each);
    m.impl("requantize_each", &requantize_each);
    m.impl("dequantize_means_each", &dequantize_means_each);
  }
};

}  // namespace gqsgd
