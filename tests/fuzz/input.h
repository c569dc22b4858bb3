// The bytes of an input, buffers of exact size, and kernels on all instruction sets, whole and in
// parts.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "core/dtypes.h"
#include "core/lanes.h"
#include "cpu/kernels.h"

namespace gqsgd {

inline void require(bool condition, const char* what) {
  if (condition) return;
  fprintf(stderr, "decode: %s\n", what);
  abort();
}

// On the heap, and not a byte longer than asked for.
struct Memory {
  explicit Memory(int64_t bytes, int content = 0xa5)
      : size(static_cast<size_t>(bytes)), data(new unsigned char[size]) {
    if (size) memset(data.get(), content, size);
  }
  Memory(const Memory& other) : Memory(static_cast<int64_t>(other.size)) {
    if (size) memcpy(data.get(), other.data.get(), size);
  }
  bool operator==(const Memory& other) const {
    return size == other.size && (!size || !memcmp(data.get(), other.data.get(), size));
  }
  size_t size;
  std::unique_ptr<unsigned char[]> data;
};

// The bytes of an input, taken for what is asked for.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}

  int64_t number(int64_t low, int64_t high) { return low + take<uint16_t>() % (high - low + 1); }
  bool flip() { return number(0, 1) != 0; }
  template <class T>
  T take() {
    T value{};
    const size_t size = std::min(sizeof(T), static_cast<size_t>(end_ - at_));
    if (size) memcpy(&value, at_, size);
    at_ += size;
    return value;
  }
  // All bytes that are left, as often as it takes; another beginning each time.
  Memory payload(int64_t bytes) {
    Memory memory(bytes, 0);
    const size_t left = static_cast<size_t>(end_ - at_);
    for (size_t i = 0; left && i < memory.size; ++i) memory.data[i] = at_[(i + 7 * turn_) % left];
    ++turn_;
    return memory;
  }

 private:
  const uint8_t *at_, *end_;
  size_t turn_ = 0;
};

inline int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

template <class T>
bool same_floats(const Memory& a, const Memory& b) {
  for (size_t i = 0; i < a.size; i += sizeof(T)) {
    T x, y;
    memcpy(&x, a.data.get() + i, sizeof(T));
    memcpy(&y, b.data.get() + i, sizeof(T));
    const auto p = load(x), q = load(y);
    // The bits of a NaN may be a peer's, or another one's.
    if (memcmp(&x, &y, sizeof(T)) && (p == p || q == q)) return false;
  }
  return true;
}

inline bool same(DType dtype, const Memory& a, const Memory& b) {
  switch (dtype) {
    case DType::kFloat32:
      return same_floats<float>(a, b);
    case DType::kFloat64:
      return same_floats<double>(a, b);
    case DType::kFloat16:
      return same_floats<Half>(a, b);
    case DType::kBFloat16:
      return same_floats<BFloat16>(a, b);
  }
  return false;
}

using Run = std::function<void(const Kernels&, unsigned char* out, int64_t begin, int64_t end)>;
using Same = std::function<bool(const Memory&, const Memory&)>;

// Runs a kernel on [first, last), whole and in two parts, on all instruction sets. Of `size` bytes
// of output it may write to those from `from` to `to`.
inline void everywhere(int64_t first, int64_t cut, int64_t last, int64_t size, int64_t from,
                       int64_t to, const Run& run, const Same& same_bits) {
  const Kernels* tables[3];
  const int count = available_kernels(tables);
  const Memory before(size);
  std::vector<Memory> outputs;
  for (int i = 0; i < count; ++i) {
    for (const int64_t middle : {last, cut}) {
      Memory& out = outputs.emplace_back(before);
      run(*tables[i], out.data.get(), first, middle);
      if (middle < last) run(*tables[i], out.data.get(), middle, last);
      require(same_bits(outputs[0], out), "the bits depend on instruction sets or on parts");
      for (int64_t byte = 0; byte < size; ++byte) {
        const bool own = from <= byte && byte < to;
        require(own || out.data[static_cast<size_t>(byte)] == 0xa5, "it wrote to other tiles");
      }
    }
  }
}

inline bool same_bytes(const Memory& a, const Memory& b) { return a == b; }

// Kernels for blocks of different widths; see blocks.cc.
void fuzz_blocks(Input& in);

}  // namespace gqsgd
