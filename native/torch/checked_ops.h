// The kernels as torch ops, for any device that has them: arguments are checked in full, so that no
// kernel can leave its tensors. Schemas and fake kernels stand in hvd_gqsgd/_native/ops.py. The
// dispatcher calls these without the GIL.
//
// A device is a class with these, where `on` is a tensor on it and `kernels` has the functions of
// struct Kernels:
//     static void run(const Tensor& on, int64_t begin, int64_t end, int64_t grain, F f);
//         f(kernels, first, last) for parts of [begin, end), perhaps at the same time, and of at
//         least `grain` if that is for threads
//     static void run(const Tensor& on, F f);
//         f(kernels), once
#pragma once

#include <torch/library.h>

#include <algorithm>

#include "core/hash.h"
#include "core/lanes.h"
#include "torch/checked_args.h"

namespace gqsgd {

inline at::ScalarType norm_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? at::kLong : at::kInt;
}

// Of the types that have such norms, the one of the arithmetic.
inline DType arithmetic_of(const Tensor& norms) {
  return norms.scalar_type() == at::kLong ? DType::kFloat64 : DType::kFloat32;
}

inline void check_geometry(const Tensor& x, int64_t block_size) {
  TORCH_CHECK_VALUE(x.is_contiguous(), "the tensor must be contiguous");
  TORCH_CHECK_VALUE(block_size >= 1, "block_size must be at least 1, got ", block_size);
}

inline at::ScalarType word_dtype(int64_t bits) {
  return fits_int32(static_cast<int>(bits)) ? at::kInt : at::kLong;
}

// Checks all but the values in the buffers, which must be on `device`, so that no kernel can leave
// them.
inline CodeArgs code_args(DType dtype, const Layout& layout, const Tensor& norms, int64_t kind,
                          int64_t bits, int64_t levels, at::Device device) {
  const CodeKind checked = checked_kind(kind, bits, levels);
  check_buffer(norms, "norms", norm_dtype(dtype), layout.blocks(), device);
  return {dtype,
          layout.numel,
          layout.block,
          checked,
          static_cast<int>(bits),
          static_cast<int32_t>(levels),
          norms.const_data_ptr()};
}

inline CodeArgs code_args(const Tensor& x, const Tensor& norms, const Tensor& words,
                          const Layout& layout, int64_t kind, int64_t bits, int64_t levels) {
  TORCH_CHECK_VALUE(x.is_contiguous(), "the tensor must be contiguous");
  const CodeArgs args =
      code_args(dtype_of(x, "the tensor"), layout, norms, kind, bits, levels, x.device());
  check_buffer(words, "words", word_dtype(bits), layout.words(), x.device());
  return args;
}

inline void check_tiles(const Layout& layout, int64_t first, int64_t last) {
  TORCH_CHECK_VALUE(0 <= first && first <= last && last <= layout.tiles(),
                    "tiles must be within 0 to ", layout.tiles(), ", got ", first, " to ", last);
}

// Elements that the means of tiles [first, last) take, of the wider type of norms and words.
inline int64_t means_of(const Layout& layout, DType dtype, int64_t bits, int64_t first,
                        int64_t last) {
  check_tiles(layout, first, last);
  const int64_t norm_size = at::elementSize(norm_dtype(dtype));
  const int64_t word_size = at::elementSize(word_dtype(bits));
  const MeansLayout at{layout, word_size, std::max(norm_size, word_size)};
  return at.begin(last) - at.begin(first);
}

inline void check_means(const Tensor& means, const Layout& layout, DType dtype, int64_t bits,
                        int64_t first, int64_t last, at::Device device) {
  const bool wide = norm_dtype(dtype) == at::kLong || word_dtype(bits) == at::kLong;
  check_buffer(means, "means", wide ? at::kLong : at::kInt,
               means_of(layout, dtype, bits, first, last), device);
}

// What sum_of_squares() checks, which devices do in other ways.
inline DType check_sum_of_squares(const Tensor& x, const Tensor& sum) {
  check_geometry(x, 1);
  check_buffer(sum, "sum", at::kDouble, 1, x.device());
  return dtype_of(x, "the tensor");
}

// A row of so many words for each rank, of lanes of `bits` bits.
inline Received check_received(const Tensor& received, int64_t words, int64_t bits,
                               at::Device device) {
  TORCH_CHECK_TYPE(received.scalar_type() == word_dtype(bits), "received must be ",
                   word_dtype(bits), ", got ", received.scalar_type());
  TORCH_CHECK_VALUE(received.dim() == 2 && received.size(0) >= 1 && received.size(1) == words &&
                        (words <= 1 || received.stride(1) == 1),
                    "received must be a row of ", words, " words for each rank, got ",
                    received.sizes(), " with strides ", received.strides());
  TORCH_CHECK_VALUE(received.device() == device, "received must be on ", device, ", got one on ",
                    received.device());
  // Sums of linear codes are kept in 32 bits, and what comes in may be anything.
  TORCH_CHECK_VALUE(received.size(0) <= 32768, "received must be from at most 32768 ranks, got ",
                    received.size(0));
  return {received.const_data_ptr(), received.size(0), received.stride(0)};
}

template <class Device>
struct CheckedOps {
  static void block_max(const Tensor& x, int64_t block_size, Tensor norms) {
    check_geometry(x, block_size);
    const DType dtype = dtype_of(x, "the tensor");
    const int64_t blocks = ceil_div(x.numel(), block_size);
    check_buffer(norms, "norms", norm_dtype(dtype), blocks, x.device());
    Device::run(x, 0, blocks, grain(block_size),
                [&](const auto& kernels, int64_t begin, int64_t end) {
                  kernels.block_max(dtype, x.const_data_ptr(), x.numel(), block_size,
                                    norms.mutable_data_ptr(), begin, end);
                });
  }

  static void block_argmax(const Tensor& x, int64_t block_size, Tensor places) {
    check_geometry(x, block_size);
    const bool bytes = places.scalar_type() == at::kByte;
    const int64_t most = bytes ? 256 : 65536;
    TORCH_CHECK_VALUE(block_size <= most, "block_size must be at most ", most, " for places of ",
                      places.scalar_type(), ", got ", block_size);
    const int64_t blocks = ceil_div(x.numel(), block_size);
    check_buffer(places, "places", bytes ? at::kByte : at::kShort, blocks, x.device());
    const DType dtype = dtype_of(x, "the tensor");
    Device::run(x, 0, blocks, grain(block_size),
                [&](const auto& kernels, int64_t begin, int64_t end) {
                  kernels.block_argmax(dtype, x.const_data_ptr(), x.numel(), block_size,
                                       places.mutable_data_ptr(), bytes, begin, end);
                });
  }

  static void block_squares(const Tensor& x, const Tensor& norms, Tensor squares,
                            int64_t block_size) {
    check_geometry(x, block_size);
    const DType dtype = dtype_of(x, "the tensor");
    const Layout layout{x.numel(), block_size, 1};
    check_buffer(norms, "norms", norm_dtype(dtype), layout.blocks(), x.device());
    check_buffer(squares, "squares", at::kLong, layout.blocks(), x.device());
    const CodeArgs args{
        dtype, x.numel(), block_size, CodeKind::kLinear, 0, 0, norms.const_data_ptr()};
    Device::run(x, 0, layout.blocks(), grain(block_size),
                [&](const auto& kernels, int64_t begin, int64_t end) {
                  kernels.block_squares(args, x.const_data_ptr(),
                                        squares.mutable_data_ptr<int64_t>(), begin, end);
                });
  }

  static void l2_norms(Tensor norms, const Tensor& squares) {
    TORCH_CHECK_TYPE(norms.scalar_type() == at::kInt || norms.scalar_type() == at::kLong,
                     "norms must be Int or Long, got ", norms.scalar_type());
    check_buffer(norms, "norms", norms.scalar_type(), norms.numel(), norms.device());
    check_buffer(squares, "squares", at::kLong, norms.numel(), norms.device());
    const DType dtype = arithmetic_of(norms);
    Device::run(norms, [&](const auto& kernels) {
      kernels.l2_norms(dtype, norms.mutable_data_ptr(), squares.const_data_ptr<int64_t>(), 0,
                       norms.numel());
    });
  }

  static void quantize(const Tensor& x, const Tensor& norms, Tensor words, int64_t block_size,
                       int64_t kind, int64_t bits, int64_t levels, int64_t seed, int64_t step,
                       int64_t tensor_id, int64_t rank, int64_t world_size, bool correlated) {
    TORCH_CHECK_VALUE(1 <= world_size && world_size <= INT32_MAX, "world_size must be from 1 to ",
                      INT32_MAX, ", got ", world_size);
    TORCH_CHECK_VALUE(0 <= rank && rank < world_size, "rank must be from 0 to ", world_size - 1,
                      ", got ", rank);
    const Layout layout = layout_of(x.numel(), block_size, bits);
    const CodeArgs args = code_args(x, norms, words, layout, kind, bits, levels);
    const RankDither dither = rank_dither(seed, step, tensor_id, static_cast<uint32_t>(rank),
                                          static_cast<uint32_t>(world_size), correlated);
    Device::run(x, 0, layout.tiles(), grain(kTile),
                [&](const auto& kernels, int64_t begin, int64_t end) {
                  kernels.quantize(args, x.const_data_ptr(), dither.key, dither.offset,
                                   words.mutable_data_ptr(), begin, end);
                });
  }

  static void dequantize(const Tensor& words, const Tensor& norms, Tensor out, int64_t block_size,
                         int64_t kind, int64_t bits, int64_t levels, int64_t contributors,
                         double scale) {
    const Layout layout = layout_of(out.numel(), block_size, bits);
    const CodeArgs args = code_args(out, norms, words, layout, kind, bits, levels);
    check_added(args);
    const int64_t most = most_ranks(args);
    TORCH_CHECK_VALUE(contributors >= 1 && contributors <= most, "contributors must be from 1 to ",
                      most, " for ", bits, " bits and ", levels, " levels, got ", contributors);
    Device::run(out, 0, layout.tiles(), grain(kTile),
                [&](const auto& kernels, int64_t begin, int64_t end) {
                  kernels.dequantize(args, words.const_data_ptr(), contributors, scale,
                                     out.mutable_data_ptr(), begin, end);
                });
  }

  static void sum_codes(const Tensor& received, const Tensor& norms, Tensor out, int64_t block_size,
                        int64_t kind, int64_t bits, int64_t levels, double scale) {
    check_geometry(out, block_size);
    const Layout layout = layout_of(out.numel(), block_size, bits);
    const DType dtype = dtype_of(out, "the tensor");
    const CodeArgs args = code_args(dtype, layout, norms, kind, bits, levels, out.device());
    const Received pieces = check_received(received, layout.words(), bits, out.device());
    Device::run(out, 0, layout.tiles(), grain(kTile * pieces.ranks),
                [&](const auto& kernels, int64_t begin, int64_t end) {
                  kernels.sum_codes(args, pieces, scale, out.mutable_data_ptr(), begin, end);
                });
  }

  static void requantize(const Tensor& received, const Tensor& norms, Tensor means, int64_t numel,
                         int64_t block_size, int64_t kind, int64_t bits, int64_t levels,
                         int64_t first, int64_t last, int64_t seed, int64_t step,
                         int64_t tensor_id) {
    const Layout layout = layout_of(numel, block_size, bits);
    const DType dtype = arithmetic_of(norms);
    const at::Device device = norms.device();
    const CodeArgs args = code_args(dtype, layout, norms, kind, bits, levels, device);
    check_tiles(layout, first, last);
    const int64_t words = layout.word(last) - layout.word(first);
    const Received pieces = check_received(received, words, bits, device);
    check_means(means, layout, dtype, bits, first, last, device);
    const uint64_t key = dither_key(seed, step, tensor_id, kRequantizeStream);
    Device::run(received, first, last, grain(kTile * pieces.ranks),
                [&](const auto& kernels, int64_t begin, int64_t end) {
                  kernels.requantize(args, pieces, key, means.mutable_data_ptr(), first, begin,
                                     end);
                });
  }

  static void dequantize_means(const Tensor& means, const Tensor& norms, Tensor out,
                               int64_t block_size, int64_t kind, int64_t bits, int64_t levels,
                               int64_t first, int64_t last, double scale) {
    check_geometry(out, block_size);
    const Layout layout = layout_of(out.numel(), block_size, bits);
    const DType dtype = dtype_of(out, "the tensor");
    const CodeArgs args = code_args(dtype, layout, norms, kind, bits, levels, out.device());
    check_means(means, layout, dtype, bits, first, last, out.device());
    Device::run(out, first, last, grain(kTile),
                [&](const auto& kernels, int64_t begin, int64_t end) {
                  kernels.dequantize_means(args, means.const_data_ptr(), scale,
                                           out.mutable_data_ptr(), first, begin, end);
                });
  }

  static void combine(const Tensor& from, Tensor to, int64_t bits, int64_t key) {
    TORCH_CHECK_VALUE(bits == 4 || bits == 8, "bits must be 4 or 8 for exponential codes, got ",
                      bits);
    check_buffer(from, "from", at::kByte, from.numel(), to.device());
    check_buffer(to, "to", at::kByte, from.numel(), to.device());
    Device::run(to, [&](const auto& kernels) {
      kernels.combine(static_cast<int>(bits), from.const_data_ptr(), to.mutable_data_ptr(),
                      static_cast<uint64_t>(key), to.numel());
    });
  }

  static void register_all(torch::Library& m) {
    m.impl("block_max", &block_max);
    m.impl("block_argmax", &block_argmax);
    m.impl("block_squares", &block_squares);
    m.impl("l2_norms", &l2_norms);
    m.impl("quantize", &quantize);
    m.impl("dequantize", &dequantize);
    m.impl("sum_codes", &sum_codes);
    m.impl("requantize", &requantize);
    m.impl("dequantize_means", &dequantize_means);
    m.impl("combine", &combine);
  }
};

}  // namespace gqsgd
