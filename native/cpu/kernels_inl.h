// The loops of the CPU kernels. Included by one source file for each instruction set, which sets
// the compiler's target first; everything here is local to that file.

#include "gqsgd/dtypes.h"
#include "gqsgd/hash.h"
#include "gqsgd/lanes.h"
#include "gqsgd/linear.h"
#include "kernels.h"

namespace gqsgd {
namespace {

template <class T>
void block_max(const T* x, int64_t numel, int64_t block, typename Traits<T>::Norm* norms,
               int64_t begin, int64_t end) {
  using Bits = decltype(magnitude(T{}));
  for (int64_t b = begin; b < end; ++b) {
    const T* __restrict in = x + b * block;
    const int64_t size = numel - b * block < block ? numel - b * block : block;
    Bits most = 0;
    for (int64_t i = 0; i < size; ++i) {
      const Bits bits = magnitude(in[i]);
      most = bits > most ? bits : most;
    }
    norms[b] = norm_from_magnitude(T{}, most);
  }
}

template <class T, class Word>
void quantize(const LinearArgs& args, const T* x, uint64_t key, uint32_t offset, Word* words,
              int64_t begin, int64_t end) {
  using Real = typename Traits<T>::Real;
  using Norm = typename Traits<T>::Norm;
  const Layout layout{args.numel, args.block, lanes_per_word(args.bits)};
  const Word bias = static_cast<Word>(lane_bias(args.bits, args.levels));
  const int32_t levels = args.levels;
  const int fraction = fraction_bits(levels);

  for (int64_t t = begin; t < end; ++t) {
    const Layout::Tile tile = layout.tile(t);
    const Norm norm = static_cast<const Norm*>(args.norms)[tile.block];
    Word* __restrict out = words + tile.word;
    for (int64_t j = 0; j < tile.words; ++j) out[j] = bias;
    if (!is_finite_norm(norm)) continue;  // codes mean nothing there: the block decodes to NaN

    const Grid<Real> grid = make_grid(bit_cast<Real>(norm), levels, fraction);
    const uint64_t keyed = tile_key(key, static_cast<uint64_t>(t));
    for (int64_t lane = 0; lane * tile.words < tile.size; ++lane) {
      const int64_t first = lane * tile.words;
      const int64_t left = tile.size - first;
      const int32_t count = static_cast<int32_t>(left < tile.words ? left : tile.words);
      const int shift = static_cast<int>(lane) * args.bits;
      const T* __restrict in = x + tile.begin + first;
      const uint32_t index = static_cast<uint32_t>(first);
      for (int32_t j = 0; j < count; ++j) {
        const uint32_t dither = dither_bits(keyed, index + static_cast<uint32_t>(j)) + offset;
        const int32_t code = quantize_element(load(in[j]), grid, levels, fraction, dither);
        out[j] += static_cast<Word>(static_cast<int64_t>(code)) << shift;
      }
    }
  }
}

template <class T, class Word>
void dequantize(const LinearArgs& args, const Word* words, int64_t contributors, double scale,
                T* out, int64_t begin, int64_t end) {
  using Real = typename Traits<T>::Real;
  using Norm = typename Traits<T>::Norm;
  using Signed = typename std::make_signed<Word>::type;
  const Layout layout{args.numel, args.block, lanes_per_word(args.bits)};
  const Word mask = (Word{1} << args.bits) - 1;
  const int32_t bias = static_cast<int32_t>(contributors * args.levels);
  const Real ratio = static_cast<Real>(scale / args.levels);

  for (int64_t t = begin; t < end; ++t) {
    const Layout::Tile tile = layout.tile(t);
    const Norm norm_bits = static_cast<const Norm*>(args.norms)[tile.block];
    if (!is_finite_norm(norm_bits)) {
      for (int64_t j = 0; j < tile.size; ++j) store(out + tile.begin + j, quiet_nan(norm_bits));
      continue;
    }
    const Real norm = bit_cast<Real>(norm_bits);
    const Word* __restrict in = words + tile.word;
    for (int64_t lane = 0; lane * tile.words < tile.size; ++lane) {
      const int64_t first = lane * tile.words;
      const int64_t left = tile.size - first;
      const int64_t count = left < tile.words ? left : tile.words;
      const int shift = static_cast<int>(lane) * args.bits;
      T* __restrict to = out + tile.begin + first;
      if (lane + 1 < layout.lanes) {
        for (int64_t j = 0; j < count; ++j) {
          const int32_t code_sum = static_cast<int32_t>((in[j] >> shift) & mask) - bias;
          store(to + j, dequantize_element(code_sum, ratio, norm));
        }
      } else {  // the top lane is signed and has no bias
        for (int64_t j = 0; j < count; ++j) {
          const int32_t code_sum = static_cast<int32_t>(static_cast<Signed>(in[j]) >> shift);
          store(to + j, dequantize_element(code_sum, ratio, norm));
        }
      }
    }
  }
}

// From runtime types to templates.
template <class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat64:
      return f(double{});
    case DType::kFloat16:
      return f(Half{});
    case DType::kBFloat16:
      return f(BFloat16{});
  }
}

template <class F>
void with_word(int bits, F f) {
  if (fits_int32(bits)) {
    f(uint32_t{});
  } else {
    f(uint64_t{});
  }
}

void block_max_any(DType dtype, const void* x, int64_t numel, int64_t block, void* norms,
                   int64_t begin, int64_t end) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    block_max(static_cast<const T*>(x), numel, block, static_cast<typename Traits<T>::Norm*>(norms),
              begin, end);
  });
}

void quantize_any(const LinearArgs& args, const void* x, uint64_t key, uint32_t offset, void* words,
                  int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    with_word(args.bits, [&](auto word) {
      using Word = decltype(word);
      quantize(args, static_cast<const decltype(type)*>(x), key, offset, static_cast<Word*>(words),
               begin, end);
    });
  });
}

void dequantize_any(const LinearArgs& args, const void* words, int64_t contributors, double scale,
                    void* out, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    with_word(args.bits, [&](auto word) {
      using Word = decltype(word);
      dequantize(args, static_cast<const Word*>(words), contributors, scale,
                 static_cast<decltype(type)*>(out), begin, end);
    });
  });
}

}  // namespace
}  // namespace gqsgd
