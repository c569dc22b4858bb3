// The kernels for blocks of different widths, on all tensors of a bucket in one call. Offsets and
// lengths are checked as in checked_ops.h; a plan is data, which kernels check themselves.
#pragma once

#include <torch/library.h>

#include "core/block_bits.h"
#include "torch/bucket_ops.h"

namespace gqsgd {

// The division of a bucket's blocks and words among ranks: offsets, each list with its end.
struct BlockSegments {
  static constexpr int64_t kFlag = 1;  // element of the means before a rank's norms

  at::IntArrayRef blocks, words;

  BlockSegments(at::IntArrayRef blocks, at::IntArrayRef words) : blocks(blocks), words(words) {
    TORCH_CHECK_VALUE(!blocks.empty() && blocks.size() == words.size(),
                      "blocks and words must be offsets of as many segments, got ", blocks.size(),
                      " and ", words.size());
    check_offsets(blocks, "blocks");
    check_offsets(words, "words");
    TORCH_CHECK_VALUE(words.back() <= INT32_MAX, "a message must be of at most ", INT32_MAX,
                      " words, got ", words.back());
  }
  int64_t ranks() const { return static_cast<int64_t>(blocks.size()) - 1; }
  void check_rank(int64_t rank) const {
    TORCH_CHECK_VALUE(0 <= rank && rank < ranks(), "a segment must be from 0 to ", ranks() - 1,
                      ", got ", rank);
  }
  // Of the means of a rank, in elements of the size of a norm.
  int64_t means_of(int64_t rank, int64_t norm_size) const {
    return kFlag + blocks[rank + 1] - blocks[rank] +
           ceil_div((words[rank + 1] - words[rank]) * int64_t{sizeof(int32_t)}, norm_size);
  }

 private:
  static void check_offsets(at::IntArrayRef offsets, const char* role) {
    TORCH_CHECK_VALUE(offsets.front() == 0 && std::is_sorted(offsets.begin(), offsets.end()), role,
                      " must be offsets that begin with 0, got ", offsets);
  }
};

template <class Device>
struct BlockOps {
  // What all tensors of a bucket share.
  struct Bucket {
    DType arithmetic;
    const BlockSegments& segments;
    const Tensor &norms, &plan;
    int64_t block;

    Bucket(const BlockSegments& segments, const Tensor& norms, const Tensor& plan, int64_t block)
        : arithmetic(arithmetic_of(norms)),
          segments(segments),
          norms(norms),
          plan(plan),
          block(block) {
      TORCH_CHECK_VALUE(1 <= block && block <= kTile, "block_size must be from 1 to ", kTile,
                        " for widths per block, got ", block);
      check_buffer(norms, "norms", norm_dtype(arithmetic), segments.blocks.back(), norms.device());
      check_buffer(plan, "plan", at::kInt, 2 * segments.blocks.back() + 1, norms.device());
    }
    Layout layout(int64_t numel, int64_t first) const {
      const Layout layout = layout_of(numel, block, 2);
      TORCH_CHECK_VALUE(0 <= first && first <= segments.blocks.back() - layout.blocks(),
                        "norms of ", layout.blocks(), " blocks begin at ", first, " of ",
                        segments.blocks.back());
      return {numel, block, 1};
    }
    // Of a tensor whose blocks begin at `first`.
    CodeArgs args(DType dtype, int64_t numel, int64_t first) const {
      TORCH_CHECK_TYPE(norm_dtype(dtype) == norms.scalar_type(), "norms must be ",
                       norm_dtype(dtype), ", got ", norms.scalar_type());
      const auto* bits = static_cast<const char*>(norms.const_data_ptr());
      return {dtype, numel, block, CodeKind::kLinear, 0, 0, bits + first * norms.element_size()};
    }
    BlockPlan plan_of(int64_t first, int64_t begin, int64_t end, int64_t summands = 1,
                      int64_t contributors = 1) const {
      const auto* widths = plan.const_data_ptr<int32_t>();
      return {widths + first,
              widths + segments.blocks.back() + first,
              begin,
              end,
              static_cast<int32_t>(summands),
              static_cast<int32_t>(contributors)};
    }
    // That a run of blocks is of one segment.
    void check_run(int64_t first, int64_t begin, int64_t end, int64_t rank) const {
      segments.check_rank(rank);
      TORCH_CHECK_VALUE(begin <= end && segments.blocks[rank] <= first + begin &&
                            first + end <= segments.blocks[rank + 1],
                        "blocks ", first + begin, " to ", first + end, " must be of segment ",
                        rank);
    }
  };

  // Codes that ranks add; their words, in the memory of so many 32-bit ones, have 64 bits.
  static void check_summands(int64_t summands, int64_t most) {
    TORCH_CHECK_VALUE(1 <= summands && 2 * summands < int64_t{1} << most,
                      "summands must leave a level to lanes of ", most, " bits, got ", summands);
  }
  static void check_pairs(const Tensor& words, at::IntArrayRef starts, int64_t summands) {
    if (summands == 1) return;
    const bool even = std::all_of(starts.begin(), starts.end(), [](auto n) { return n % 2 == 0; });
    const auto address = reinterpret_cast<uintptr_t>(words.const_data_ptr());
    TORCH_CHECK_VALUE(even && address % sizeof(uint64_t) == 0,
                      "words of codes that are added must begin at multiples of 8 bytes");
  }

  static uint32_t* words_of(const Tensor& means, int64_t element) {
    auto* bytes = static_cast<char*>(means.data_ptr());
    return reinterpret_cast<uint32_t*>(bytes + element * means.element_size());
  }

  static void block_widths(const Tensor& norms, const Tensor& columns, at::IntArrayRef blocks,
                           at::IntArrayRef words, int64_t power, int64_t least, int64_t most,
                           int64_t summands, Tensor plan) {
    const BlockSegments segments(blocks, words);
    const Bucket bucket(segments, norms, plan, 1);
    const int64_t all = segments.blocks.back();
    check_buffer(columns, "columns", at::kByte, all, norms.device());
    TORCH_CHECK_VALUE(0 <= power && power <= kMostPower, "power must be from 0 to ", kMostPower,
                      ", in units of 1/256, got ", power);
    TORCH_CHECK_VALUE(2 <= least && least <= most && most <= 16,
                      "widths must be from 2 to 16 bits, got ", least, " to ", most);
    check_summands(summands, least);
    const WidthRule rule{static_cast<int32_t>(power), static_cast<int32_t>(least),
                         static_cast<int32_t>(most), static_cast<int32_t>(summands)};
    auto* widths = plan.mutable_data_ptr<int32_t>();
    Device::run(norms, 0, segments.ranks(), 1,
                [&](const auto& kernels, int64_t first, int64_t last) {
                  for (int64_t rank = first; rank < last; ++rank) {
                    const int64_t begin = blocks[rank];
                    const auto* bits = static_cast<const char*>(norms.const_data_ptr());
                    kernels.block_widths(bucket.arithmetic, bits + begin * norms.element_size(),
                                         columns.const_data_ptr<uint8_t>() + begin,
                                         blocks[rank + 1] - begin, rule, words[rank],
                                         words[rank + 1], widths + begin, widths + all + begin);
                  }
                });
    plan.narrow(0, 2 * all, 1).fill_(words.back());
  }

  static void quantize_blocks(at::TensorList xs, const Tensor& norms, const Tensor& plan,
                              Tensor words, at::IntArrayRef blocks, at::IntArrayRef word_starts,
                              int64_t block_size, int64_t summands, int64_t seed, int64_t step,
                              at::IntArrayRef tensor_ids, int64_t rank, int64_t world_size,
                              bool correlated, bool nearest) {
    check_one_each(tensor_ids, "tensor_ids", xs.size());
    const BlockSegments segments(blocks, word_starts);
    const Bucket bucket(segments, norms, plan, block_size);
    check_buffer(words, "words", at::kInt, word_starts.back(), norms.device());
    check_summands(summands, 16);
    check_pairs(words, word_starts, summands);
    TORCH_CHECK_VALUE(1 <= world_size && world_size <= INT32_MAX, "world_size must be from 1 to ",
                      INT32_MAX, ", got ", world_size);
    TORCH_CHECK_VALUE(0 <= rank && rank < world_size, "rank must be from 0 to ", world_size - 1,
                      ", got ", rank);
    int64_t first = 0;
    for (size_t i = 0; i < xs.size(); ++i) {
      const Tensor& x = xs[i];
      check_geometry(x, block_size);
      TORCH_CHECK_VALUE(x.device() == norms.device(), "the tensor must be on ", norms.device(),
                        ", got one on ", x.device());
      const Layout layout = bucket.layout(x.numel(), first);
      CodeArgs args = bucket.args(dtype_of(x, "the tensor"), x.numel(), first);
      if (nearest) args.kind = CodeKind::kNearest;
      const BlockPlan places = bucket.plan_of(first, 0, word_starts.back(), summands);
      const RankDither dither =
          rank_dither(seed, step, tensor_ids[i], rank, world_size, correlated);
      auto* to = reinterpret_cast<uint32_t*>(words.mutable_data_ptr<int32_t>());
      Device::run(x, 0, layout.blocks(), grain(block_size),
                  [&](const auto& kernels, int64_t begin, int64_t end) {
                    kernels.quantize_blocks(args, places, x.const_data_ptr(), dither.key,
                                            dither.offset, to, begin, end);
                  });
      first += layout.blocks();
    }
  }

  // Of one tensor, whose blocks begin at `first` and are all of one rank.
  static void sum_blocks(const Tensor& received, const Tensor& norms, const Tensor& plan,
                         Tensor out, int64_t first, at::IntArrayRef blocks,
                         at::IntArrayRef word_starts, int64_t rank, int64_t block_size,
                         int64_t summands, int64_t contributors, double scale) {
    const BlockSegments segments(blocks, word_starts);
    const Bucket bucket(segments, norms, plan, block_size);
    segments.check_rank(rank);
    check_summands(summands, 16);
    check_pairs(received, word_starts, summands);
    TORCH_CHECK_VALUE(summands == 1 || received.size(0) == 1,
                      "codes that were added must be one row, got ", received.size(0));
    TORCH_CHECK_VALUE(1 <= contributors && contributors <= summands,
                      "contributors must be from 1 to summands, ", summands, ", got ",
                      contributors);
    const int64_t length = word_starts[rank + 1] - word_starts[rank];
    const Received pieces = check_received(received, length, 32, norms.device());
    check_geometry(out, block_size);
    TORCH_CHECK_VALUE(out.device() == norms.device(), "the tensor must be on ", norms.device(),
                      ", got one on ", out.device());
    const Layout layout = bucket.layout(out.numel(), first);
    bucket.check_run(first, 0, layout.blocks(), rank);
    const CodeArgs args = bucket.args(dtype_of(out, "the tensor"), out.numel(), first);
    const BlockPlan places =
        bucket.plan_of(first, word_starts[rank], word_starts[rank + 1], summands, contributors);
    Device::run(out, 0, layout.blocks(), grain(block_size * pieces.ranks),
                [&](const auto& kernels, int64_t begin, int64_t end) {
                  kernels.sum_blocks(args, places, pieces, scale, out.mutable_data_ptr(), begin,
                                     end);
                });
  }

  // Of the blocks of one rank; `runs` as in `Runs`, with the rank at their end.
  static void requantize_blocks(const Tensor& received, const Tensor& norms, const Tensor& plan,
                                Tensor means, at::IntArrayRef numels, at::IntArrayRef norm_starts,
                                at::IntArrayRef runs, at::IntArrayRef blocks,
                                at::IntArrayRef word_starts, int64_t rank, int64_t block_size,
                                int64_t seed, int64_t step, at::IntArrayRef tensor_ids) {
    check_one_each(norm_starts, "norm_starts", numels.size());
    check_one_each(tensor_ids, "tensor_ids", numels.size());
    const BlockSegments segments(blocks, word_starts);
    const Bucket bucket(segments, norms, plan, block_size);
    segments.check_rank(rank);
    const int64_t length = word_starts[rank + 1] - word_starts[rank];
    const Received pieces = check_received(received, length, 32, norms.device());
    check_buffer(means, "means", norms.scalar_type(), segments.means_of(rank, norms.element_size()),
                 norms.device());
    const int64_t own = blocks[rank + 1] - blocks[rank];
    Runs{runs, numels.size()}.each([&](size_t i, int64_t first, int64_t last, int64_t of) {
      TORCH_CHECK_VALUE(of == rank, "runs must be of segment ", rank, ", got one of ", of);
      const int64_t before = norm_starts[i];
      check_tiles(bucket.layout(numels[i], before), first, last);
      bucket.check_run(before, first, last, rank);
      const CodeArgs args = bucket.args(bucket.arithmetic, numels[i], before);
      const BlockPlan places = bucket.plan_of(before, word_starts[rank], word_starts[rank + 1]);
      const uint64_t key = dither_key(seed, step, tensor_ids[i], kRequantizeStream);
      void* shares = words_of(means, BlockSegments::kFlag + before + first - blocks[rank]);
      uint32_t* words = words_of(means, BlockSegments::kFlag + own);
      Device::run(received, first, last, grain(block_size * received.size(0)),
                  [&](const auto& kernels, int64_t begin, int64_t end) {
                    kernels.requantize_blocks(args, places, pieces, key, shares, words, first,
                                              begin, end);
                  });
    });
  }

  static void dequantize_blocks(const Tensor& means, const Tensor& norms, const Tensor& plan,
                                at::TensorList outs, at::IntArrayRef norm_starts,
                                at::IntArrayRef runs, at::IntArrayRef blocks,
                                at::IntArrayRef word_starts, int64_t block_size, double scale) {
    check_one_each(norm_starts, "norm_starts", outs.size());
    const BlockSegments segments(blocks, word_starts);
    const Bucket bucket(segments, norms, plan, block_size);
    std::vector<int64_t> offsets{0};
    for (int64_t rank = 0; rank < segments.ranks(); ++rank) {
      offsets.push_back(offsets.back() + segments.means_of(rank, norms.element_size()));
    }
    check_buffer(means, "means", norms.scalar_type(), offsets.back(), norms.device());
    Runs{runs, outs.size()}.each([&](size_t i, int64_t first, int64_t last, int64_t rank) {
      const Tensor& out = outs[i];
      check_geometry(out, block_size);
      TORCH_CHECK_VALUE(out.device() == norms.device(), "the tensor must be on ", norms.device(),
                        ", got one on ", out.device());
      const int64_t before = norm_starts[i];
      check_tiles(bucket.layout(out.numel(), before), first, last);
      bucket.check_run(before, first, last, rank);
      const CodeArgs args = bucket.args(dtype_of(out, "the tensor"), out.numel(), before);
      const BlockPlan places = bucket.plan_of(before, word_starts[rank], word_starts[rank + 1]);
      const int64_t shares = offsets[rank] + BlockSegments::kFlag;
      const void* from = words_of(means, shares + before + first - blocks[rank]);
      const uint32_t* words = words_of(means, shares + blocks[rank + 1] - blocks[rank]);
      Device::run(out, first, last, grain(block_size),
                  [&](const auto& kernels, int64_t begin, int64_t end) {
                    kernels.dequantize_blocks(args, places, from, words, scale,
                                              out.mutable_data_ptr(), first, begin, end);
                  });
    });
  }

  static void register_all(torch::Library& m) {
    m.impl("block_widths", &block_widths);
    m.impl("quantize_blocks", &quantize_blocks);
    m.impl("sum_blocks", &sum_blocks);
    m.impl("requantize_blocks", &requantize_blocks);
    m.impl("dequantize_blocks", &dequantize_blocks);
  }
};

}  // namespace gqsgd
