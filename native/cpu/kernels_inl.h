// The CPU kernels as templates, and the way from runtime types to them. Included by one source file
// for each instruction set, which sets the compiler's target first; everything here and in what it
// includes is local to that file.

#include "block_bits_inl.h"
#include "codes_inl.h"
#include "kernels.h"
#include "norms_inl.h"
#include "two_phase_inl.h"

namespace gqsgd {
namespace {

void block_max_any(DType dtype, const void* x, int64_t numel, int64_t block, void* norms,
                   int64_t begin, int64_t end) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    block_max(static_cast<const T*>(x), numel, block, static_cast<typename Traits<T>::Norm*>(norms),
              begin, end);
  });
}

void block_argmax_any(DType dtype, const void* x, int64_t numel, int64_t block, void* places,
                      bool bytes, int64_t begin, int64_t end) {
  with_type(dtype, [&](auto type) {
    const auto* in = static_cast<const decltype(type)*>(x);
    if (bytes) {
      block_argmax(in, numel, block, static_cast<uint8_t*>(places), begin, end);
    } else {
      block_argmax(in, numel, block, static_cast<uint16_t*>(places), begin, end);
    }
  });
}

void block_squares_any(const CodeArgs& args, const void* x, int64_t* squares, int64_t begin,
                       int64_t end) {
  with_type(args.dtype, [&](auto type) {
    block_squares(args, static_cast<const decltype(type)*>(x), squares, begin, end);
  });
}

void l2_norms_any(DType dtype, void* norms, const int64_t* squares, int64_t begin, int64_t end) {
  with_real(dtype, [&](auto real) {
    using Real = decltype(real);
    l2_norms<Real>(static_cast<typename Traits<Real>::Norm*>(norms), squares, begin, end);
  });
}

void quantize_any(const CodeArgs& args, const void* x, uint64_t key, uint32_t offset, void* words,
                  int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    with_code<typename Traits<T>::Real>(args, [&](auto code, auto word) {
      quantize(args, code, static_cast<const T*>(x), key, offset,
               static_cast<decltype(word)*>(words), begin, end);
    });
  });
}

void dequantize_any(const CodeArgs& args, const void* words, int64_t contributors, double scale,
                    void* out, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    with_sums<typename Traits<T>::Real>(args, contributors, scale, [&](auto sums, auto word) {
      dequantize(args, sums, static_cast<const decltype(word)*>(words), static_cast<T*>(out), begin,
                 end);
    });
  });
}

void combine_any(int bits, const void* from, void* to, uint64_t key, int64_t bytes) {
  (bits == 8 ? combine<8> : combine<4>)(static_cast<const uint8_t*>(from),
                                        static_cast<uint8_t*>(to), key, bytes);
}

void sum_codes_any(const CodeArgs& args, const Received& received, double scale, void* out,
                   int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    with_code<typename Traits<T>::Real>(args, [&](auto code, auto word) {
      sum_codes<T, decltype(word)>(args, code, received, scale, static_cast<T*>(out), begin, end);
    });
  });
}

void requantize_any(const CodeArgs& args, const Received& received, uint64_t key, void* means,
                    int64_t first, int64_t begin, int64_t end) {
  with_real(args.dtype, [&](auto real) {
    using Real = decltype(real);
    with_code<Real>(args, [&](auto code, auto word) {
      requantize<Real, decltype(word)>(args, code, received, key,
                                       static_cast<unsigned char*>(means), first, begin, end);
    });
  });
}

void dequantize_means_any(const CodeArgs& args, const void* means, double scale, void* out,
                          int64_t first, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    with_code<typename Traits<T>::Real>(args, [&](auto code, auto word) {
      dequantize_means<T, decltype(word)>(args, code, static_cast<const unsigned char*>(means),
                                          scale, static_cast<T*>(out), first, begin, end);
    });
  });
}

double sum_of_squares_any(DType dtype, const void* x, int64_t numel) {
  double sum = 0;
  with_type(dtype,
            [&](auto type) { sum = sum_of_squares(static_cast<const decltype(type)*>(x), numel); });
  return sum;
}

void block_widths_any(DType dtype, const void* norms, const uint8_t* columns, int64_t blocks,
                      const WidthRule& rule, int64_t begin, int64_t end, int32_t* widths,
                      int32_t* starts) {
  with_real(dtype, [&](auto real) {
    using Norm = typename Traits<decltype(real)>::Norm;
    block_widths(static_cast<const Norm*>(norms), columns, blocks, rule, begin, end, widths,
                 starts);
  });
}

void quantize_blocks_any(const CodeArgs& args, const BlockPlan& plan, const void* x, uint64_t key,
                         uint32_t offset, uint32_t* words, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    quantize_blocks(args, plan, static_cast<const decltype(type)*>(x), key, offset, words, begin,
                    end);
  });
}

void sum_blocks_any(const CodeArgs& args, const BlockPlan& plan, const Received& received,
                    double scale, void* out, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    sum_blocks(args, plan, received, scale, static_cast<decltype(type)*>(out), begin, end);
  });
}

void requantize_blocks_any(const CodeArgs& args, const BlockPlan& plan, const Received& received,
                           uint64_t key, void* shares, uint32_t* words, int64_t first,
                           int64_t begin, int64_t end) {
  with_real(args.dtype, [&](auto real) {
    using Real = decltype(real);
    using Norm = typename Traits<Real>::Norm;
    requantize_blocks<Real>(args, plan, received, key, static_cast<Norm*>(shares), words, first,
                            begin, end);
  });
}

void dequantize_blocks_any(const CodeArgs& args, const BlockPlan& plan, const void* shares,
                           const uint32_t* words, double scale, void* out, int64_t first,
                           int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    using Norm = typename Traits<T>::Norm;
    dequantize_blocks(args, plan, static_cast<const Norm*>(shares), words, scale,
                      static_cast<T*>(out), first, begin, end);
  });
}

constexpr Kernels make_table(const char* name) {
  return {name,
          block_max_any,
          block_argmax_any,
          block_squares_any,
          l2_norms_any,
          quantize_any,
          dequantize_any,
          sum_codes_any,
          requantize_any,
          dequantize_means_any,
          combine_any,
          sum_of_squares_any,
          block_widths_any,
          quantize_blocks_any,
          sum_blocks_any,
          requantize_blocks_any,
          dequantize_blocks_any};
}

}  // namespace
}  // namespace gqsgd
