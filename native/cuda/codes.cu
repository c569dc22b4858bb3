// Elements to codes in words, and sums of codes back. The threads with one y share a tile, and each
// has some consecutive words of it: so it reads and writes consecutive elements of every lane.
#include "codes.h"
#include "core/hash.h"
#include "kernels.h"

namespace gqsgd {
namespace {

template <int kBits, class T, class Word, class Code>
__global__ void quantize_kernel(Layout layout, Code code, const typename Traits<T>::Norm* norms,
                                const T* x, uint64_t key, uint32_t offset, Word* words,
                                int64_t begin, int64_t end) {
  using Real = typename Traits<T>::Real;
  constexpr int kWords = words_of_thread<T, Word>;
  if (kBits) code.bits = kBits;
  const Word bias = static_cast<Word>(code.bias());

  for_each_run<kWords>(layout, begin, end, [&](int64_t t, const Layout::Tile& tile, int word) {
    const auto norm = norms[tile.block];
    const T* from = x + tile.begin;
    Word* to = words + tile.word + word;
    if_packed<kWords>(layout, tile, from, to, [&](auto packed) {
      constexpr bool kPacked = decltype(packed)::value;
      // Where the number of lanes is known, all loads come before the first use.
      constexpr bool kAhead = kBits > 0 && kPacked;
      T in[kAhead ? sizeof(Word) * 8 / (kBits ? kBits : 1) : 1][kWords];
      if constexpr (kAhead) {
        for_each_lane<kBits, Word>(layout, [&](int lane) {
          load_run(from + lane * static_cast<int>(tile.words) + word, kWords, true, in[lane]);
        });
      }
      Word out[kWords];
#pragma unroll
      for (int k = 0; k < kWords; ++k) out[k] = bias;
      if (is_finite_norm(norm)) {  // codes mean nothing otherwise: the block decodes to NaN
        const Grid<Real> grid = code.grid(bit_cast<Real>(norm));
        const uint64_t keyed = tile_key(key, static_cast<uint64_t>(t));
        for_each_lane<kBits, Word>(layout, [&](int lane) {
          const int first = lane * static_cast<int>(tile.words) + word;
          if constexpr (!kAhead) {  // zero, as the code of that, where there is no element
            load_run(from + first, elements_left<kWords, kPacked>(tile, word, first), kPacked,
                     in[0]);
          }
#pragma unroll
          for (int k = 0; k < kWords; ++k) {
            const uint32_t bits = dither_bits(keyed, static_cast<uint32_t>(first + k));
            const int32_t c =
                code.encode(load(in[kAhead ? lane : 0][k]), grid, code.drawn(bits + offset));
            out[k] += static_cast<Word>(static_cast<int64_t>(c)) << (lane * code.bits);
          }
        });
      }
      store_run(to, words_left<kWords, kPacked>(tile, word), kPacked, out);
    });
  });
}

template <int kBits, class T, class Word, class Sums>
__global__ void dequantize_kernel(Layout layout, Sums sums, const typename Traits<T>::Norm* norms,
                                  const Word* words, T* out, int64_t begin, int64_t end) {
  using Real = typename Traits<T>::Real;
  constexpr int kWords = words_of_thread<T, Word>;
  if (kBits) sums.bits = kBits;

  for_each_run<kWords>(layout, begin, end, [&](int64_t, const Layout::Tile& tile, int word) {
    const auto norm = norms[tile.block];
    const Word* from = words + tile.word + word;
    T* to = out + tile.begin;
    if_packed<kWords>(layout, tile, to, from, [&](auto packed) {
      constexpr bool kPacked = decltype(packed)::value;
      Word in[kWords];
      load_run(from, words_left<kWords, kPacked>(tile, word), kPacked, in);
      store_lanes<kBits, kPacked>(layout, tile, word, norm, in, to,
                                  [&](Word w, int lane, bool top) -> Real {
                                    const int shift = lane * sums.bits;
                                    const Real real = bit_cast<Real>(norm);
                                    return sums.is_signed(top) ? sums.decode_signed(w, shift, real)
                                                               : sums.decode_biased(w, shift, real);
                                  });
    });
  });
}

template <int kBits>
__device__ __forceinline__ uint8_t combine_byte(uint8_t from, uint8_t to, uint64_t key, int64_t i) {
  constexpr uint32_t kMask = (1u << kBits) - 1;
  uint32_t sum = 0;
#pragma unroll
  for (int shift = 0; shift < 8; shift += kBits) {
    const uint32_t dither = hash_bits(key, static_cast<uint32_t>(i * 8 + shift) / kBits);
    sum |= exponential_sum<kBits>(from >> shift & kMask, to >> shift & kMask, dither) << shift;
  }
  return static_cast<uint8_t>(sum);
}

template <int kBits>
__global__ void combine_kernel(const uint8_t* from, uint8_t* to, uint64_t key, int64_t bytes) {
  constexpr int kCount = Pack<uint8_t>::kSize;
  const bool aligned = is_aligned(from) && is_aligned(to);
  const int64_t threads = int64_t{gridDim.x} * kThreads;
  int64_t begin = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kCount;
  for (; begin < bytes; begin += threads * kCount) {
    const bool packed = aligned && begin + kCount <= bytes;
    uint8_t a[kCount], b[kCount];
    load_run(from + begin, bytes - begin, packed, a);
    load_run(static_cast<const uint8_t*>(to) + begin, bytes - begin, packed, b);
#pragma unroll
    for (int k = 0; k < kCount; ++k) b[k] = combine_byte<kBits>(a[k], b[k], key, begin + k);
    store_run(to + begin, bytes - begin, packed, b);
  }
}

}  // namespace

void CudaKernels::quantize(const CodeArgs& args, const void* x, uint64_t key, uint32_t offset,
                           void* words, int64_t begin, int64_t end) const {
  const Layout layout(args.numel, args.block, lanes_per_word(args.bits));
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    with_code<typename Traits<T>::Real>(args, [&](auto code, auto word) {
      using Word = decltype(word);
      using Code = decltype(code);
      with_bits<Code::kBits, Word>(code.bits, [&](auto bits) {
        const Runs runs = runs_for(layout, words_of_thread<T, Word>, end - begin);
        launch(stream, runs.grid, runs.threads,
               quantize_kernel<decltype(bits)::value, T, Word, Code>, layout, code,
               static_cast<const typename Traits<T>::Norm*>(args.norms), static_cast<const T*>(x),
               key, offset, static_cast<Word*>(words), begin, end);
      });
    });
  });
}

void CudaKernels::dequantize(const CodeArgs& args, const void* words, int64_t contributors,
                             double scale, void* out, int64_t begin, int64_t end) const {
  const Layout layout(args.numel, args.block, lanes_per_word(args.bits));
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    with_sums<typename Traits<T>::Real>(args, contributors, scale, [&](auto sums, auto word) {
      using Word = decltype(word);
      using Sums = decltype(sums);
      if constexpr (Sums::kAdded) {  // all others come back as means
        with_bits<0, Word>(sums.bits, [&](auto bits) {
          const Runs runs = runs_for(layout, words_of_thread<T, Word>, end - begin);
          launch(stream, runs.grid, runs.threads,
                 dequantize_kernel<decltype(bits)::value, T, Word, Sums>, layout, sums,
                 static_cast<const typename Traits<T>::Norm*>(args.norms),
                 static_cast<const Word*>(words), static_cast<T*>(out), begin, end);
        });
      }
    });
  });
}

void CudaKernels::combine(int bits, const void* from, void* to, uint64_t key, int64_t bytes) const {
  const int64_t each = int64_t{kThreads} * Pack<uint8_t>::kSize;
  launch(stream, grid_for(bytes, each), kThreads, bits == 8 ? combine_kernel<8> : combine_kernel<4>,
         static_cast<const uint8_t*>(from), static_cast<uint8_t*>(to), key, bytes);
}

}  // namespace gqsgd
