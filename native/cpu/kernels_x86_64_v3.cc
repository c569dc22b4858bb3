// The CPU kernels for x86-64-v3 (AVX2). Standard headers come first: what follows the pragma must
// not leave this file.
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("arch=x86-64-v3")
#include "kernels_inl.h"

namespace gqsgd {

const Kernels* x86_64_v3_kernels() {
  static const Kernels table{"x86-64-v3", block_max_any, quantize_any, dequantize_any};
  return __builtin_cpu_supports("x86-64-v3") ? &table : nullptr;
}

}  // namespace gqsgd
#else
namespace gqsgd {
const Kernels* x86_64_v3_kernels() { return nullptr; }
}  // namespace gqsgd
#endif
