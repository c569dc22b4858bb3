// What goes into the caches ahead of time, and what goes past them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace gqsgd {
namespace {

constexpr int64_t kLine = 64;

// Prefetches `bytes` bytes, `ahead` bytes after `from`. Hardware prefetchers stop at each page.
inline __attribute__((always_inline)) void prefetch(const void* from, int64_t ahead,
                                                    int64_t bytes) {
  const char* at = static_cast<const char*>(from) + ahead;
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(at + i);
}

// Results of so many bytes would push more out of the caches than they leave there to be read.
constexpr int64_t kStreamed = int64_t{4} << 20;

// Whether `numel` results of a type go past the caches. Those of 16 bits do not: their conversion
// takes longer than the write.
template <class T>
inline __attribute__((always_inline)) bool is_streamed(int64_t numel) {
#if defined(__SSE2__)
  return sizeof(T) >= 4 && numel * int64_t{sizeof(T)} >= kStreamed;
#else
  return false;
#endif
}

inline __attribute__((always_inline)) bool begins_line(const void* at) {
  return reinterpret_cast<uintptr_t>(at) % uintptr_t{kLine} == 0;
}

// Copies whole lines to where lines begin, past the caches where there is a way.
inline __attribute__((always_inline)) void stream(const void* from, void* to, int64_t bytes) {
#if defined(__SSE2__)
  const auto* in = static_cast<const __m128i*>(from);
  auto* out = static_cast<__m128i*>(to);
  for (int64_t i = 0; i < bytes / int64_t{sizeof(__m128i)}; ++i) {
    _mm_stream_si128(out + i, _mm_load_si128(in + i));
  }
#else
  memcpy(to, from, static_cast<size_t>(bytes));
#endif
}

// Other threads see what was streamed before what is written from here on.
inline __attribute__((always_inline)) void end_of_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace gqsgd
