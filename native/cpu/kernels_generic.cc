// The CPU kernels for the instruction set that the compiler was asked for: any processor.
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels_inl.h"

namespace gqsgd {

const Kernels* generic_kernels() {
  static const Kernels table = make_table("generic");
  return &table;
}

}  // namespace gqsgd
