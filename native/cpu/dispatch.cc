#include <initializer_list>

#include "kernels.h"

namespace gqsgd {

int available_kernels(const Kernels* tables[3]) {
  int count = 0;
  for (const Kernels* table : {generic_kernels(), x86_64_v3_kernels(), x86_64_v4_kernels()}) {
    if (table) tables[count++] = table;
  }
  return count;
}

}  // namespace gqsgd
