// Norms of blocks: one warp a tile. The tiles of a larger block meet in its norm, by atomic
// operations on integers, whose result has no order to depend on.
#include "core/l2.h"
#include "device.h"
#include "kernels.h"

namespace gqsgd {
namespace {

__device__ __forceinline__ void atomic_max(int32_t* to, int32_t value) { atomicMax(to, value); }
__device__ __forceinline__ void atomic_max(int64_t* to, int64_t value) {
  atomicMax(reinterpret_cast<long long*>(to), static_cast<long long>(value));
}

template <class T>
__global__ void block_max_kernel(Layout layout, const T* x, typename Traits<T>::Norm* norms,
                                 int64_t begin, int64_t end) {
  for_each_tile_of_warp(layout, begin, end, [&](const Layout::Tile& tile) {
    decltype(magnitude(T{})) most = 0;
    for_each_of_warp(x + tile.begin, tile.size, [&](T value) {
      const auto bits = magnitude(value);
      most = bits > most ? bits : most;
    });
    const auto norm = warp_max(norm_from_magnitude(T{}, most));
    if (threadIdx.x % kWarp != 0) return;
    if (layout.block_tiles == 1) {
      norms[tile.block] = norm;
    } else if (norm > *static_cast<volatile decltype(norm)*>(norms + tile.block)) {
      atomic_max(norms + tile.block, norm);  // seldom: most tiles have less than those before
    }
  });
}

// A warp a block. Each thread has the first of its own elements, and the warp the first of those.
template <class T, class Place>
__global__ void block_argmax_kernel(const T* x, int64_t numel, int64_t block, Place* places,
                                    int64_t begin, int64_t end) {
  const int64_t warps = int64_t{gridDim.x} * (kThreads / kWarp);
  int64_t b = begin + int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  for (; b < end; b += warps) {
    const int64_t left = numel - b * block;
    const int64_t size = left < block ? left : block;
    int64_t place = size;
    decltype(magnitude(T{})) most = -1;
    for (int64_t i = threadIdx.x % kWarp; i < size; i += kWarp) {
      const auto bits = magnitude(x[b * block + i]);
      place = bits > most ? i : place;
      most = bits > most ? bits : most;
    }
    const auto all = warp_max(most);
    const int64_t before = warp_max(most == all ? -place : -size);
    if (threadIdx.x % kWarp == 0) places[b] = static_cast<Place>(-before);
  }
}

template <class T>
__global__ void block_squares_kernel(Layout layout, const T* x,
                                     const typename Traits<T>::Norm* norms, int64_t* squares,
                                     int64_t begin, int64_t end) {
  using Real = typename Traits<T>::Real;
  for_each_tile_of_warp(layout, begin, end, [&](const Layout::Tile& tile) {
    const auto norm = norms[tile.block];
    int64_t sum = 0;
    if (is_finite_norm(norm)) {
      const Grid<Real> grid = make_grid(bit_cast<Real>(norm), kSquareUnits, 15);
      for_each_of_warp(x + tile.begin, tile.size,
                       [&](T value) { sum += square_element(load(value), grid); });
    }
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp != 0) return;
    if (layout.block_tiles == 1) {
      squares[tile.block] = sum;
    } else {
      atomicAdd(reinterpret_cast<unsigned long long*>(squares + tile.block),
                static_cast<unsigned long long>(sum));
    }
  });
}

template <class Real>
__global__ void l2_norms_kernel(typename Traits<Real>::Norm* norms, const int64_t* squares,
                                int64_t begin, int64_t end) {
  const Real most = bit_cast<Real>(largest_finite(bits_of(Real{})));
  const int64_t threads = int64_t{gridDim.x} * kThreads;
  for (int64_t b = begin + int64_t{blockIdx.x} * kThreads + threadIdx.x; b < end; b += threads) {
    if (!is_finite_norm(norms[b])) continue;
    norms[b] = bits_of(l2_norm(bit_cast<Real>(norms[b]), squares[b], most));
  }
}

// As on the CPU, 16 sums for each part: here one thread each.
constexpr int kSums = 16;

template <class T>
__global__ void squares_of_parts_kernel(const T* x, int64_t numel, double* parts) {
  constexpr int kParts = kThreads / kSums;
  const int lane = threadIdx.x % kSums;
  const int64_t all = (numel + kSquaresPart - 1) / kSquaresPart;
  __shared__ double sums[kThreads];
  for (int64_t first = int64_t{blockIdx.x} * kParts; first < all; first += gridDim.x * kParts) {
    const int64_t part = first + threadIdx.x / kSums;
    const int64_t begin = part * kSquaresPart;
    const int64_t end = begin + kSquaresPart < numel ? begin + kSquaresPart : numel;
    double sum = 0;
#pragma unroll 16
    for (int64_t i = begin + lane; i < end; i += kSums) {
      const double value = load(x[i]);
      sum += value * value;
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (lane == 0 && part < all) {
      double total = 0;
      for (int i = 0; i < kSums; ++i) total += sums[threadIdx.x + i];
      parts[part] = total;
    }
    __syncthreads();
  }
}

__global__ void sum_in_order_kernel(const double* parts, int64_t count, double* sum) {
  double total = 0;
#pragma unroll 16
  for (int64_t i = 0; i < count; ++i) total += parts[i];
  *sum = total;
}

}  // namespace

void CudaKernels::block_max(DType dtype, const void* x, int64_t numel, int64_t block, void* norms,
                            int64_t begin, int64_t end) const {
  const Layout layout(numel, block, 1);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    auto* to = static_cast<typename Traits<T>::Norm*>(norms);
    if (layout.block_tiles > 1 && begin < end) {
      check_cuda(
          cudaMemsetAsync(to + begin, 0, static_cast<size_t>(end - begin) * sizeof(*to), stream),
          "cudaMemsetAsync");
    }
    const int64_t first = layout.tiles_before(begin), last = layout.tiles_before(end);
    launch(stream, grid_for(last - first, kThreads / kWarp), kThreads, block_max_kernel<T>, layout,
           static_cast<const T*>(x), to, first, last);
  });
}

void CudaKernels::block_argmax(DType dtype, const void* x, int64_t numel, int64_t block,
                               void* places, bool bytes, int64_t begin, int64_t end) const {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto choose = [&](auto* to) {
      using Place = std::remove_pointer_t<decltype(to)>;
      launch(stream, grid_for(end - begin, kThreads / kWarp), kThreads,
             block_argmax_kernel<T, Place>, static_cast<const T*>(x), numel, block, to, begin, end);
    };
    if (bytes) {
      choose(static_cast<uint8_t*>(places));
    } else {
      choose(static_cast<uint16_t*>(places));
    }
  });
}

void CudaKernels::block_squares(const CodeArgs& args, const void* x, int64_t* squares,
                                int64_t begin, int64_t end) const {
  const Layout layout(args.numel, args.block, 1);
  if (layout.block_tiles > 1 && begin < end) {
    check_cuda(cudaMemsetAsync(squares + begin, 0,
                               static_cast<size_t>(end - begin) * sizeof(*squares), stream),
               "cudaMemsetAsync");
  }
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t first = layout.tiles_before(begin), last = layout.tiles_before(end);
    launch(stream, grid_for(last - first, kThreads / kWarp), kThreads, block_squares_kernel<T>,
           layout, static_cast<const T*>(x),
           static_cast<const typename Traits<T>::Norm*>(args.norms), squares, first, last);
  });
}

void CudaKernels::l2_norms(DType dtype, void* norms, const int64_t* squares, int64_t begin,
                           int64_t end) const {
  with_real(dtype, [&](auto real) {
    using Real = decltype(real);
    launch(stream, grid_for(end - begin, kThreads), kThreads, l2_norms_kernel<Real>,
           static_cast<typename Traits<Real>::Norm*>(norms), squares, begin, end);
  });
}

void CudaKernels::sum_of_squares(DType dtype, const void* x, int64_t numel, double* parts,
                                 double* sum) const {
  const int64_t count = ceil_div(numel, kSquaresPart);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    launch(stream, grid_for(count, kThreads / kSums), kThreads, squares_of_parts_kernel<T>,
           static_cast<const T*>(x), numel, parts);
  });
  launch(stream, 1, 1, sum_in_order_kernel, static_cast<const double*>(parts), count, sum);
}

}  // namespace gqsgd
