// What kernels share: memory 16 bytes at a time, and maxima and sums over a warp.
#pragma once

#include <type_traits>

#include "core/codes.h"
#include "launch.h"

namespace gqsgd {
namespace {

template <class T>
struct Pack {
  static constexpr int kSize = sizeof(uint4) / sizeof(T);
  T values[kSize];
};

template <class T>
__device__ __forceinline__ bool is_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(uint4) == 0;
}
template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* from, int64_t index) {
  return bit_cast<Pack<T>>(reinterpret_cast<const uint4*>(from)[index]);
}
template <class T>
__device__ __forceinline__ void store_pack(T* to, int64_t index, const Pack<T>& pack) {
  // By name: compilers take an assignment apart, and do not always put it together again.
  __stcg(reinterpret_cast<uint4*>(to) + index, bit_cast<uint4>(pack));
}

// The first `count` of kCount elements; all of them, in packs, if `packed`.
template <class T, int kCount>
__device__ __forceinline__ void load_run(const T* from, int64_t count, bool packed,
                                         T (&to)[kCount]) {
  constexpr int kSize = Pack<T>::kSize;
  if (packed && kCount % kSize == 0) {
#pragma unroll
    for (int i = 0; i < kCount / kSize; ++i) {
      const Pack<T> pack = load_pack(from, i);
#pragma unroll
      for (int k = 0; k < kSize; ++k) to[i * kSize + k] = pack.values[k];
    }
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) to[k] = k < count ? from[k] : T{};
  }
}

template <class T, int kCount>
__device__ __forceinline__ void store_run(T* to, int64_t count, bool packed,
                                          const T (&from)[kCount]) {
  constexpr int kSize = Pack<T>::kSize;
  if (packed && kCount % kSize == 0) {
#pragma unroll
    for (int i = 0; i < kCount / kSize; ++i) {
      Pack<T> pack;
#pragma unroll
      for (int k = 0; k < kSize; ++k) pack.values[k] = from[i * kSize + k];
      store_pack(to, i, pack);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (k < count) to[k] = from[k];
    }
  }
}

// What __shfl_xor_sync takes.
template <class T>
using Shuffled = std::conditional_t<sizeof(T) == 8, long long, int>;

template <class T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, static_cast<Shuffled<T>>(value), apart);
    value = other > value ? other : value;
  }
  return value;
}

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) {
    value += __shfl_xor_sync(0xffffffffu, static_cast<Shuffled<T>>(value), apart);
  }
  return value;
}

// The elements of a tile, shared by the threads of a warp: f(element).
template <class T, class F>
__device__ __forceinline__ void for_each_of_warp(const T* x, int64_t size, F f) {
  constexpr int kSize = Pack<T>::kSize;
  const int lane = threadIdx.x % kWarp;
  const auto take = [&](const Pack<T>& pack) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) f(pack.values[k]);
  };
  if (size == kTile && is_aligned(x)) {
    // All loads before the first use.
    constexpr int kPacks = kTile / kSize / kWarp;
    Pack<T> packs[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      packs[i] = load_pack(x, i * kWarp + lane);
    }
#pragma unroll
    for (int i = 0; i < kPacks; ++i) take(packs[i]);
    return;
  }
  int64_t begin = 0;
  if (is_aligned(x)) {
    begin = size / kSize * kSize;
    for (int64_t i = lane; i < size / kSize; i += kWarp) {
      take(load_pack(x, i));
    }
  }
  for (int64_t i = begin + lane; i < size; i += kWarp) f(x[i]);
}

// f(tile's number, tile) for this warp's tiles of [begin, end).
template <class F>
__device__ __forceinline__ void for_each_tile_of_warp(const Layout& layout, int64_t begin,
                                                      int64_t end, F f) {
  const int64_t warps = int64_t{gridDim.x} * (kThreads / kWarp);
  int64_t tile = begin + int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  for (; tile < end; tile += warps) f(layout.tile(tile));
}

}  // namespace
}  // namespace gqsgd
