// As much of CUDA as the kernels need, on the CPU: for tests where there is no GPU. Takes the place
// of CUDA's own header when native/cuda is compiled as C++.
//
// The threads of a block are fibers that run one after the other, each until it waits for others.
// What the hardware leaves undefined ends the program here: packs that are not aligned, warps that
// are not full, and barriers that not all threads come to.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
// The blocks of a grid come one after the other.
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulated {

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "a kernel is wrong: %s\n", what);
  abort();
}

class Block;
inline Block* block;

struct Barrier {
  unsigned members = 0, arrived = 0, generation = 0;
  inline void wait();
};

struct Warp {
  Barrier barrier;
  long long values[32];
};

class Block {
 public:
  Barrier barrier;
  std::vector<Warp> warps;

  Block(dim3 size, const std::function<void()>& kernel)
      : warps((size.x * size.y + 31) / 32), fibers_(size.x * size.y), kernel_(kernel) {
    barrier.members = static_cast<unsigned>(fibers_.size());
    for (unsigned i = 0; i < fibers_.size(); ++i) {
      Fiber& fiber = fibers_[i];
      fiber.index = dim3(i % size.x, i / size.x);
      ++warps[i / 32].barrier.members;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stack(i);
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, enter, 0);
    }
  }

  void run() {
    block = this;
    for (bool alive = true; alive;) {
      alive = moved_ = false;
      for (now_ = 0; now_ < fibers_.size(); ++now_) {
        if (fibers_[now_].done) continue;
        alive = true;
        threadIdx = fibers_[now_].index;
        swapcontext(&scheduler_, &fibers_[now_].context);
      }
      if (alive && !moved_) fail("threads wait for others that never come");
    }
  }
  void yield() { swapcontext(&fibers_[now_].context, &scheduler_); }
  void moved() { moved_ = true; }
  size_t thread() const { return now_; }

 private:
  struct Fiber {
    ucontext_t context;
    dim3 index;
    bool done = false;
  };
  static constexpr size_t kStack = 1 << 16;

  static char* stack(size_t fiber) {
    static std::vector<std::unique_ptr<char[]>> stacks;  // used again: they are large
    while (stacks.size() <= fiber) stacks.emplace_back(new char[kStack]);
    return stacks[fiber].get();
  }
  static void enter() {
    block->kernel_();
    block->fibers_[block->now_].done = true;
    block->moved();
  }

  std::vector<Fiber> fibers_;
  const std::function<void()>& kernel_;
  ucontext_t scheduler_;
  size_t now_ = 0;
  bool moved_ = false;
};

inline void Barrier::wait() {
  block->moved();
  const unsigned before = generation;
  if (++arrived == members) {
    arrived = 0;
    ++generation;
  }
  while (generation == before) block->yield();
  block->moved();
}

}  // namespace emulated

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::function<void()> call = [&] { kernel(Parameters(arguments)...); };
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  for (unsigned i = 0; i < gridDim.x; ++i) {
    blockIdx = dim3(i);
    emulated::Block(blockDim, call).run();
  }
  return cudaSuccess;
}

inline void __syncthreads() { emulated::block->barrier.wait(); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int apart) {
  const size_t thread = emulated::block->thread();
  emulated::Warp& warp = emulated::block->warps[thread / 32];
  if (mask != ~0u || warp.barrier.members != 32) emulated::fail("a shuffle needs a full warp");
  warp.values[thread % 32] = value;
  warp.barrier.wait();
  const T other = static_cast<T>(warp.values[thread % 32 ^ static_cast<unsigned>(apart)]);
  warp.barrier.wait();
  return other;
}

template <class T>
T atomicMax(T* to, T value) {
  const T before = *to;
  *to = value > before ? value : before;
  return before;
}
template <class T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}

inline void __stcg(uint4* to, uint4 value) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) emulated::fail("a pack is not aligned");
  *to = value;
}
