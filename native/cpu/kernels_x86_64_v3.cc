// The CPU kernels for x86-64-v3 (AVX2). Standard headers come first: what follows the pragma must
// not leave this file.
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#if defined(__x86_64__) && __GNUC__ >= 11 && !defined(__clang__)
#pragma GCC target("arch=x86-64-v3")
#include "kernels_inl.h"

namespace gqsgd {

const Kernels* x86_64_v3_kernels() {
  static const Kernels table = make_table("x86-64-v3");
  // By feature: compilers know the name of the level as a target longer than as a question.
  const bool supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  return supported ? &table : nullptr;
}

}  // namespace gqsgd
#else
namespace gqsgd {
const Kernels* x86_64_v3_kernels() { return nullptr; }
}  // namespace gqsgd
#endif
