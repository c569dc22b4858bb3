// The CPU kernels for x86-64-v4 (AVX-512). Standard headers come first: what follows the pragma
// must not leave this file.
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#if defined(__x86_64__) && __GNUC__ >= 11 && !defined(__clang__)
#pragma GCC target("arch=x86-64-v4", "prefer-vector-width=512")
#include "kernels_inl.h"

namespace gqsgd {

const Kernels* x86_64_v4_kernels() {
  static const Kernels table = make_table("x86-64-v4");
  // By feature: compilers know the name of the level as a target longer than as a question.
  const bool supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                         __builtin_cpu_supports("avx512vl");
  return supported ? &table : nullptr;
}

}  // namespace gqsgd
#else
namespace gqsgd {
const Kernels* x86_64_v4_kernels() { return nullptr; }
}  // namespace gqsgd
#endif
