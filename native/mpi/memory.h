// Memory that MPI reads and writes while an operation is in flight.
#pragma once

#include <cstddef>
#include <new>

namespace gqsgd {

// Not initialized, on a cache line of its own. It is freed with its owner, but for an exception
// that passes while it is lent: MPI may still write to it, so it is better lost than somebody
// else's.
class MpiMemory {
 public:
  explicit MpiMemory(size_t bytes)
      : data_(static_cast<unsigned char*>(::operator new(bytes, std::align_val_t(kLine)))) {}
  MpiMemory(const MpiMemory&) = delete;
  MpiMemory& operator=(const MpiMemory&) = delete;
  ~MpiMemory() {
    if (!lent_) ::operator delete(data_, std::align_val_t(kLine));
  }

  unsigned char* data() const { return data_; }
  void lend() { lent_ = true; }
  void take_back() { lent_ = false; }

 private:
  static constexpr size_t kLine = 64;
  unsigned char* data_;
  bool lent_ = false;
};

}  // namespace gqsgd
