// Blocks of different widths; see cpu/block_bits_inl.h. The threads of a block, as CUDA calls it,
// share a block of elements: lanes are in the order of the elements in shared memory, from where a
// thread takes those of a word.
#include "core/block_bits.h"
#include "core/hash.h"
#include "device.h"
#include "kernels.h"

namespace gqsgd {
namespace {

constexpr unsigned kWidthThreads = 1024;  // that share the widths of a segment

// f(of two threads) over all threads of a block.
template <class T, class F>
__device__ __forceinline__ T over_threads(T value, F f) {
  __shared__ T of_warps[kWarp];
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) {
    value = f(value,
              static_cast<T>(__shfl_xor_sync(0xffffffffu, static_cast<Shuffled<T>>(value), apart)));
  }
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = of_warps[0];
  for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) value = f(value, of_warps[warp]);
  __syncthreads();
  return value;
}

struct Larger {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
struct Smaller {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};
struct Added {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

// The sum over the threads before this one.
__device__ __forceinline__ int64_t before_thread(int64_t value) {
  __shared__ int64_t sums[kWidthThreads];
  sums[threadIdx.x] = value;
  __syncthreads();
  int64_t sum = 0;
  for (unsigned thread = 0; thread < threadIdx.x; ++thread) sum += sums[thread];
  __syncthreads();
  return sum;
}

template <class Norm>
__global__ void block_widths_kernel(const Norm* norms, const uint8_t* columns, int64_t blocks,
                                    WidthRule rule, int64_t begin, int64_t end, int32_t* widths,
                                    int32_t* starts) {
  // Until the end, `widths` has the weights. Each thread has some blocks in a row.
  const int64_t each = ceil_div(blocks, blockDim.x);
  const int64_t first = each * threadIdx.x < blocks ? each * threadIdx.x : blocks;
  const int64_t last = first + each < blocks ? first + each : blocks;
  int32_t smallest = 0, largest = kNoWeight;
  for (int64_t b = first; b < last; ++b) {
    const int32_t weight = block_weight(norms[b], rule.power);
    widths[b] = weight;
    smallest = weight < smallest && weight != kNoWeight ? weight : smallest;
    largest = weight > largest ? weight : largest;
  }
  smallest = over_threads(smallest, Smaller{});
  largest = over_threads(largest, Larger{});
  if (largest == kNoWeight) largest = smallest;
  const auto width_of = [&](int64_t b, int32_t offset) {
    return widened(width_at(widths[b], offset, rule), rule);
  };
  const auto words_of = [&](int64_t b, int32_t width) {
    return block_words(columns[b], width, rule.summands);
  };
  const auto words_at = [&](int32_t offset) {
    int64_t sum = 0;
    for (int64_t b = first; b < last; ++b) sum += words_of(b, width_of(b, offset));
    return over_threads(sum, Added{});
  };
  const int32_t offset = best_offset(smallest, largest, rule, end - begin, words_at);
  // What is left goes to the blocks that are the next to become wider, as far as it goes.
  const auto asks_for = [&](int64_t b) {
    return words_of(b, width_of(b, offset + 1)) - words_of(b, width_of(b, offset));
  };
  int64_t wanted = 0;
  for (int64_t b = first; b < last; ++b) wanted += asks_for(b);
  const int64_t spare = end - begin - words_at(offset);
  int64_t left = spare - before_thread(wanted);
  int64_t taken = 0;
  for (int64_t b = first; b < last; ++b) {
    left -= asks_for(b);
    widths[b] = width_of(b, left >= 0 ? offset + 1 : offset);
    taken += words_of(b, widths[b]);
  }
  int64_t at = begin + before_thread(taken);
  for (int64_t b = first; b < last; ++b) {
    starts[b] = static_cast<int32_t>(at);
    at += words_of(b, widths[b]);
  }
}

// One element's lane, with the dither of its place.
template <class Code, class Real>
__device__ __forceinline__ uint32_t lane_of(const Code& code, Real x, Grid<Real> grid,
                                            uint64_t keyed, int i, uint32_t offset) {
  const uint32_t drawn = dither_bits(keyed, static_cast<uint32_t>(i)) + offset;
  return static_cast<uint32_t>(code.encode(x, grid, code.drawn(drawn)) + code.levels);
}

template <class Code>
__device__ __forceinline__ void write_words(const uint32_t* lanes, int32_t columns,
                                            const BlockPlan& plan, const BlockPlan::Place& place,
                                            const Code& code, uint32_t* out) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  if (is_added(plan.summands) && place.width) {
    const int32_t pairs = pairs_of(columns, place.width);
    for (int32_t j = thread; j < pairs; j += blockDim.x) {
      reinterpret_cast<uint64_t*>(out)[j] = packed_pair(lanes, pairs, j, place.width, code.levels);
    }
  } else {
    for (int32_t word = thread; word < place.width * columns; word += blockDim.x) {
      out[word] = packed_word(lanes, columns, word / columns, word % columns, place.width);
    }
  }
  for (int64_t i = threadIdx.x; i < place.unused; i += blockDim.x) out[place.words + i] = 0;
}

template <class T>
__global__ void quantize_blocks_kernel(Layout layout, BlockPlan plan,
                                       const typename Traits<T>::Norm* norms, const T* x,
                                       CodeKind kind, uint64_t key, uint32_t offset,
                                       uint32_t* words, int64_t begin, int64_t end) {
  using Real = typename Traits<T>::Real;
  __shared__ uint32_t lanes[kMostLanes];
  for (int64_t b = begin + blockIdx.x; b < end; b += gridDim.x) {
    const Layout::Tile tile = layout.tile(b);
    const int32_t columns = columns_of(tile.size);
    const BlockPlan::Place place = plan.place(b, columns);
    const LinearCode<Real> code = block_code<Real>(place.width, plan.summands, kind);
    if (place.width) {
      const Grid<Real> grid = code.grid(bit_cast<Real>(norms[b]));
      const uint64_t keyed = tile_key(key, static_cast<uint64_t>(b));
      const int count = lanes_of(columns, place.width, plan.summands);
      for (int i = static_cast<int>(threadIdx.x); i < count; i += blockDim.x) {
        lanes[i] = i < tile.size ? lane_of(code, static_cast<Real>(load(x[tile.begin + i])), grid,
                                           keyed, i, offset)
                                 : static_cast<uint32_t>(code.levels);
      }
    }
    __syncthreads();
    write_words(lanes, columns, plan, place, code, words + place.start);
    __syncthreads();
  }
}

// The sum over all messages of the codes of an element, with s taken off.
template <class Code>
__device__ __forceinline__ int32_t sum_of_element(const BlockPlan& plan, const Received& received,
                                                  const BlockPlan::Place& place, int32_t columns,
                                                  const Code& code, int i) {
  const int32_t bias = code.levels * plan.contributors;
  uint32_t sum = 0u - static_cast<uint32_t>(bias * received.ranks);
  for (int64_t message = 0; message < received.ranks; ++message) {
    const auto* in = static_cast<const uint32_t*>(received.words) + message * received.stride;
    in += place.start;
    if (is_added(plan.summands)) {
      const int32_t pairs = pairs_of(columns, place.width);
      const auto* words = reinterpret_cast<const uint64_t*>(in);
      sum += unpacked_pair(words[i % pairs], i / pairs, place.width, bias);
    } else {
      sum += unpacked_lane(in, columns, i / columns, i % columns, place.width);
    }
  }
  return static_cast<int32_t>(sum);
}

template <class T>
__global__ void sum_blocks_kernel(Layout layout, BlockPlan plan,
                                  const typename Traits<T>::Norm* norms, Received received,
                                  double scale, T* out, int64_t begin, int64_t end) {
  using Real = typename Traits<T>::Real;
  for (int64_t b = begin + blockIdx.x; b < end; b += gridDim.x) {
    const Layout::Tile tile = layout.tile(b);
    const int32_t columns = columns_of(tile.size);
    const BlockPlan::Place place = plan.place(b, columns);
    const auto norm = norms[b];
    const LinearCode<Real> code = block_code<Real>(place.width, plan.summands);
    const Real ratio = static_cast<Real>(code.ratio(scale));
    for (int i = static_cast<int>(threadIdx.x); i < tile.size; i += blockDim.x) {
      const int32_t c = place.width ? sum_of_element(plan, received, place, columns, code, i) : 0;
      const Real value = (static_cast<Real>(c) * ratio) * bit_cast<Real>(norm);
      store(out + tile.begin + i, is_finite_norm(norm) ? value : quiet_nan(norm));
    }
  }
}

template <class Real>
__global__ void requantize_blocks_kernel(Layout layout, BlockPlan plan, Received received,
                                         uint64_t key, typename Traits<Real>::Norm* shares,
                                         uint32_t* words, int64_t first_block, int64_t begin,
                                         int64_t end) {
  using Norm = typename Traits<Real>::Norm;
  constexpr int kEach = kTile / kThreads;
  __shared__ uint32_t lanes[kTile];
  for (int64_t b = begin + blockIdx.x; b < end; b += gridDim.x) {
    const Layout::Tile tile = layout.tile(b);
    const int32_t columns = columns_of(tile.size);
    const BlockPlan::Place place = plan.place(b, columns);
    const LinearCode<Real> code = block_code<Real>(place.width);
    const Real ratio = static_cast<Real>(code.ratio(1.0 / static_cast<double>(received.ranks)));
    Real mean[kEach] = {};
    Norm largest = 0;
    for (int e = 0; e < kEach && place.width; ++e) {
      const int i = e * kThreads + static_cast<int>(threadIdx.x);
      if (i >= tile.size) break;
      mean[e] = static_cast<Real>(sum_of_element(plan, received, place, columns, code, i)) * ratio;
      const Norm bits = magnitude(mean[e]);
      largest = bits > largest ? bits : largest;
    }
    largest = over_threads(largest, Larger{});
    if (threadIdx.x == 0) shares[b - first_block] = largest;
    const Grid<Real> grid = code.grid(bit_cast<Real>(largest));
    const uint64_t keyed = tile_key(key, static_cast<uint64_t>(b));
    for (int e = 0; e < kEach; ++e) {
      const int i = e * kThreads + static_cast<int>(threadIdx.x);
      if (i < kRows * columns) {
        lanes[i] = i < tile.size ? lane_of(code, mean[e], grid, keyed, i, 0)
                                 : static_cast<uint32_t>(code.levels);
      }
    }
    __syncthreads();
    write_words(lanes, columns, plan, place, code, words + place.start);
    __syncthreads();
  }
}

template <class T>
__global__ void dequantize_blocks_kernel(Layout layout, BlockPlan plan,
                                         const typename Traits<T>::Norm* norms,
                                         const typename Traits<T>::Norm* shares,
                                         const uint32_t* words, double scale, T* out,
                                         int64_t first_block, int64_t begin, int64_t end) {
  using Real = typename Traits<T>::Real;
  for (int64_t b = begin + blockIdx.x; b < end; b += gridDim.x) {
    const Layout::Tile tile = layout.tile(b);
    const int32_t columns = columns_of(tile.size);
    const BlockPlan::Place place = plan.place(b, columns);
    const auto norm = norms[b];
    const LinearCode<Real> code = block_code<Real>(place.width);
    const Real ratio = static_cast<Real>(code.ratio(scale));
    const Real share = place.width ? bit_cast<Real>(shares[b - first_block]) : Real(0);
    for (int i = static_cast<int>(threadIdx.x); i < tile.size; i += blockDim.x) {
      int32_t c = 0;
      if (place.width) {
        const uint32_t lane =
            unpacked_lane(words + place.start, columns, i / columns, i % columns, place.width);
        c = static_cast<int32_t>(lane) - code.levels;
      }
      const Real value = ((static_cast<Real>(c) * ratio) * share) * bit_cast<Real>(norm);
      store(out + tile.begin + i, is_finite_norm(norm) ? value : quiet_nan(norm));
    }
  }
}

}  // namespace

void CudaKernels::block_widths(DType dtype, const void* norms, const uint8_t* columns,
                               int64_t blocks, const WidthRule& rule, int64_t begin, int64_t end,
                               int32_t* widths, int32_t* starts) const {
  if (blocks == 0) return;
  with_real(dtype, [&](auto real) {
    using Norm = typename Traits<decltype(real)>::Norm;
    launch(stream, 1, dim3(kWidthThreads), block_widths_kernel<Norm>,
           static_cast<const Norm*>(norms), columns, blocks, rule, begin, end, widths, starts);
  });
}

void CudaKernels::quantize_blocks(const CodeArgs& args, const BlockPlan& plan, const void* x,
                                  uint64_t key, uint32_t offset, uint32_t* words, int64_t begin,
                                  int64_t end) const {
  const Layout layout(args.numel, args.block, 1);
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    launch(stream, grid_for(end - begin, 1), kThreads, quantize_blocks_kernel<T>, layout, plan,
           static_cast<const typename Traits<T>::Norm*>(args.norms), static_cast<const T*>(x),
           args.kind, key, offset, words, begin, end);
  });
}

void CudaKernels::sum_blocks(const CodeArgs& args, const BlockPlan& plan, const Received& received,
                             double scale, void* out, int64_t begin, int64_t end) const {
  const Layout layout(args.numel, args.block, 1);
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    launch(stream, grid_for(end - begin, 1), kThreads, sum_blocks_kernel<T>, layout, plan,
           static_cast<const typename Traits<T>::Norm*>(args.norms), received, scale,
           static_cast<T*>(out), begin, end);
  });
}

void CudaKernels::requantize_blocks(const CodeArgs& args, const BlockPlan& plan,
                                    const Received& received, uint64_t key, void* shares,
                                    uint32_t* words, int64_t first, int64_t begin,
                                    int64_t end) const {
  const Layout layout(args.numel, args.block, 1);
  with_real(args.dtype, [&](auto real) {
    using Real = decltype(real);
    launch(stream, grid_for(end - begin, 1), kThreads, requantize_blocks_kernel<Real>, layout, plan,
           received, key, static_cast<typename Traits<Real>::Norm*>(shares), words, first, begin,
           end);
  });
}

void CudaKernels::dequantize_blocks(const CodeArgs& args, const BlockPlan& plan, const void* shares,
                                    const uint32_t* words, double scale, void* out, int64_t first,
                                    int64_t begin, int64_t end) const {
  const Layout layout(args.numel, args.block, 1);
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    using Norm = typename Traits<T>::Norm;
    launch(stream, grid_for(end - begin, 1), kThreads, dequantize_blocks_kernel<T>, layout, plan,
           static_cast<const Norm*>(args.norms), static_cast<const Norm*>(shares), words, scale,
           static_cast<T*>(out), first, begin, end);
  });
}

}  // namespace gqsgd
