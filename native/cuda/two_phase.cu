// The middle and the end of a two-phase exchange; see cpu/two_phase_inl.h. The means of a tile stay
// in the registers of one block of threads, a word's each, from the sums to the codes.
#include "codes.h"
#include "core/hash.h"
#include "kernels.h"

namespace gqsgd {
namespace {

template <class Real, class Word>
MeansLayout means_layout(const Layout& layout) {
  using Norm = typename Traits<Real>::Norm;
  return {layout, sizeof(Word), sizeof(Norm) > sizeof(Word) ? sizeof(Norm) : sizeof(Word)};
}

// Over all threads of a block. `turn` alternates, so that none writes where another still reads.
template <class T>
__device__ __forceinline__ T max_of_threads(T value, int turn) {
  __shared__ T of_warps[2][kWarp];
  value = warp_max(value);
  if (threadIdx.x % kWarp == 0) of_warps[turn][threadIdx.x / kWarp] = value;
  __syncthreads();
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) {
    value = of_warps[turn][warp] > value ? of_warps[turn][warp] : value;
  }
  return value;
}

// The most lanes that a word has.
template <int kBits, class Word>
constexpr int kLanesAtMost = kBits ? 8 * sizeof(Word) / (kBits ? kBits : 1) : 64 / 3;

// Adds all ranks' codes of a thread's word of a tile, in the order of the ranks: sums of
// exponential levels are rounded. A sum stays zero where no element is. `from`: that word of rank
// 0.
template <int kMostLanes, class Word, class Code>
__device__ __forceinline__ void sum_word(const Layout& layout, const Layout::Tile& tile, int lanes,
                                         int word, const Code& code, const Received& received,
                                         const Word* from, typename Code::Sum (&sum)[kMostLanes]) {
  const int size = static_cast<int>(tile.size), count = static_cast<int>(tile.words);
  Word in = word < count ? *from : Word{0};
  for (int64_t rank = 0; rank < received.ranks; ++rank) {
    const Word now = in;
    from += received.stride;
    if (word < count && rank + 1 < received.ranks) in = *from;
#pragma unroll
    for (int lane = 0; lane < kMostLanes; ++lane) {
      const bool has = lane < lanes && word < count && lane * count + word < size;
      if (has) sum[lane] += code.decode(now, lane * code.bits, lane + 1 == lanes);
    }
  }
}

// The threads of a block, as CUDA calls it, share a tile, a word each.
template <int kBits, class T, class Word, class Code>
__global__ void sum_codes_kernel(Layout layout, Code code, const typename Traits<T>::Norm* norms,
                                 Received received, typename Traits<T>::Real ratio, T* out,
                                 int64_t begin, int64_t end) {
  using Real = typename Traits<T>::Real;
  constexpr int kMostLanes = kLanesAtMost<kBits, Word>;
  if (kBits) code.bits = kBits;
  const int lanes = kBits ? kMostLanes : static_cast<int>(layout.lanes);
  const int word = static_cast<int>(threadIdx.x);
  for (int64_t t = begin + blockIdx.x; t < end; t += gridDim.x) {
    const Layout::Tile tile = layout.tile(t);
    const int size = static_cast<int>(tile.size), count = static_cast<int>(tile.words);
    if (word >= count) continue;
    const auto norm = norms[tile.block];
    typename Code::Sum sum[kMostLanes] = {};
    const Word* from = static_cast<const Word*>(received.words) + tile.word + word;
    sum_word(layout, tile, lanes, word, code, received, from, sum);
#pragma unroll
    for (int lane = 0; lane < kMostLanes; ++lane) {
      const int i = lane * count + word;
      const Real value = (static_cast<Real>(sum[lane]) * ratio) * bit_cast<Real>(norm);
      if (lane < lanes && i < size) {
        store(out + tile.begin + i, is_finite_norm(norm) ? value : quiet_nan(norm));
      }
    }
  }
}

template <int kBits, class Real, class Word, class Code>
__global__ void requantize_kernel(MeansLayout at, Code code,
                                  const typename Traits<Real>::Norm* norms, Received received,
                                  uint64_t key, Real ratio, unsigned char* means,
                                  int64_t first_word, int64_t first_unit, int64_t begin,
                                  int64_t end) {
  using Norm = typename Traits<Real>::Norm;
  using Unit = std::conditional_t<(sizeof(Norm) > sizeof(Word)), uint64_t, Word>;
  constexpr int kMostLanes = kLanesAtMost<kBits, Word>;
  const Layout& layout = at.layout;
  if (kBits) code.bits = kBits;
  const int lanes = kBits ? kMostLanes : static_cast<int>(layout.lanes);
  const Word bias = static_cast<Word>(code.bias());
  const int word = static_cast<int>(threadIdx.x);

  int turn = 0;
  for (int64_t t = begin + blockIdx.x; t < end; t += gridDim.x, turn = 1 - turn) {
    const Layout::Tile tile = layout.tile(t);
    const int count = static_cast<int>(tile.words);
    const Word* from = static_cast<const Word*>(received.words) + tile.word - first_word + word;
    const bool finite = is_finite_norm(norms[tile.block]);

    typename Code::Sum sum[kMostLanes] = {};  // stays zero, as its code, where no element is
    sum_word(layout, tile, lanes, word, code, received, from, sum);
    Real mean[kMostLanes];
    Norm largest = 0;
#pragma unroll
    for (int lane = 0; lane < kMostLanes; ++lane) {
      mean[lane] = static_cast<Real>(sum[lane]) * ratio;
      const Norm bits = magnitude(mean[lane]);
      largest = bits > largest ? bits : largest;
    }
    largest = max_of_threads(largest, turn);

    // All of the record is written: zeros where there is neither norm nor word, or nothing to tell.
    unsigned char* record = means + (at.begin_of(t) - first_unit) * at.unit;
    Word* words = reinterpret_cast<Word*>(record + at.unit);
    if (threadIdx.x == 0) {
      const Unit norm = static_cast<std::make_unsigned_t<Norm>>(finite ? largest : 0);
      *reinterpret_cast<Unit*>(record) = norm;
      if (tile.words * sizeof(Word) % sizeof(Unit) != 0) words[count] = 0;
    }
    if (word >= count) continue;
    const Grid<Real> grid = code.grid(bit_cast<Real>(largest));
    const uint64_t keyed = tile_key(key, static_cast<uint64_t>(t));
    Word out = bias;
#pragma unroll
    for (int lane = 0; lane < kMostLanes; ++lane) {
      const uint32_t index = static_cast<uint32_t>(lane * count + word);
      const int32_t c = code.encode(mean[lane], grid, code.drawn(dither_bits(keyed, index)));
      if (lane < lanes) out += static_cast<Word>(static_cast<int64_t>(c)) << (lane * code.bits);
    }
    words[word] = finite ? out : Word{0};
  }
}

template <int kBits, class T, class Word, class Code>
__global__ void dequantize_means_kernel(MeansLayout at, Code code,
                                        const typename Traits<T>::Norm* norms,
                                        const unsigned char* means, typename Traits<T>::Real ratio,
                                        T* out, int64_t first_unit, int64_t begin, int64_t end) {
  using Real = typename Traits<T>::Real;
  using Norm = typename Traits<T>::Norm;
  constexpr int kWords = words_of_thread<T, Word>;
  const Layout& layout = at.layout;
  if (kBits) code.bits = kBits;
  for_each_run<kWords>(layout, begin, end, [&](int64_t t, const Layout::Tile& tile, int word) {
    const Norm norm = norms[tile.block];
    const unsigned char* record = means + (at.begin_of(t) - first_unit) * at.unit;
    const Real share = bit_cast<Real>(*reinterpret_cast<const Norm*>(record));
    // Records are as long as they need to be, so that their words begin anywhere.
    const Word* from = reinterpret_cast<const Word*>(record + at.unit) + word;
    Word in[kWords];
    load_run(from, tile.words - word, is_aligned(from) && word + kWords <= tile.words, in);
    T* to = out + tile.begin;
    if_packed<kWords>(layout, tile, to, static_cast<const Word*>(nullptr), [&](auto packed) {
      constexpr bool kPacked = decltype(packed)::value;
      store_lanes<kBits, kPacked>(
          layout, tile, word, norm, in, to, [&](Word w, int lane, bool top) -> Real {
            const Real c = static_cast<Real>(code.decode(w, lane * code.bits, top));
            return ((c * ratio) * share) * bit_cast<Real>(norm);
          });
    });
  });
}

}  // namespace

void CudaKernels::sum_codes(const CodeArgs& args, const Received& received, double scale, void* out,
                            int64_t begin, int64_t end) const {
  const Layout layout(args.numel, args.block, lanes_per_word(args.bits));
  const int64_t words = ceil_div(layout.largest_tile(), layout.lanes);
  const int64_t threads = ceil_div(words, kWarp) * kWarp;
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    using Real = typename Traits<T>::Real;
    with_code<Real>(args, [&](auto code, auto word) {
      using Word = decltype(word);
      using Code = decltype(code);
      with_bits<Code::kBits, Word>(code.bits, [&](auto bits) {
        launch(stream, grid_for(end - begin, 1), dim3(static_cast<unsigned>(threads)),
               sum_codes_kernel<decltype(bits)::value, T, Word, Code>, layout, code,
               static_cast<const typename Traits<T>::Norm*>(args.norms), received,
               static_cast<Real>(code.ratio(scale)), static_cast<T*>(out), begin, end);
      });
    });
  });
}

void CudaKernels::requantize(const CodeArgs& args, const Received& received, uint64_t key,
                             void* means, int64_t first, int64_t begin, int64_t end) const {
  const Layout layout(args.numel, args.block, lanes_per_word(args.bits));
  const int64_t words = ceil_div(layout.largest_tile(), layout.lanes);
  const int64_t threads = ceil_div(words, kWarp) * kWarp;
  with_real(args.dtype, [&](auto real) {
    using Real = decltype(real);
    with_code<Real>(args, [&](auto code, auto word) {
      using Word = decltype(word);
      using Code = decltype(code);
      const MeansLayout at = means_layout<Real, Word>(layout);
      with_bits<Code::kBits, Word>(code.bits, [&](auto bits) {
        launch(stream, grid_for(end - begin, 1), dim3(static_cast<unsigned>(threads)),
               requantize_kernel<decltype(bits)::value, Real, Word, Code>, at, code,
               static_cast<const typename Traits<Real>::Norm*>(args.norms), received, key,
               static_cast<Real>(code.ratio(1.0 / static_cast<double>(received.ranks))),
               static_cast<unsigned char*>(means), layout.word(first), at.begin(first), begin, end);
      });
    });
  });
}

void CudaKernels::dequantize_means(const CodeArgs& args, const void* means, double scale, void* out,
                                   int64_t first, int64_t begin, int64_t end) const {
  const Layout layout(args.numel, args.block, lanes_per_word(args.bits));
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    using Real = typename Traits<T>::Real;
    with_code<Real>(args, [&](auto code, auto word) {
      using Word = decltype(word);
      using Code = decltype(code);
      const MeansLayout at = means_layout<Real, Word>(layout);
      with_bits<Code::kBits, Word>(code.bits, [&](auto bits) {
        const Runs runs = runs_for(layout, words_of_thread<T, Word>, end - begin);
        launch(stream, runs.grid, runs.threads,
               dequantize_means_kernel<decltype(bits)::value, T, Word, Code>, at, code,
               static_cast<const typename Traits<T>::Norm*>(args.norms),
               static_cast<const unsigned char*>(means), static_cast<Real>(code.ratio(scale)),
               static_cast<T*>(out), at.begin(first), begin, end);
      });
    });
  });
}

}  // namespace gqsgd
