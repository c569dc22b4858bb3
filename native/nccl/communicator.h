// Collectives of NCCL, enqueued on a stream. Errors come as exceptions with NCCL's own text.
#pragma once

#include <cuda_runtime.h>
#include <nccl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace gqsgd {

class NcclError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

inline void check_nccl(ncclResult_t code, const char* call, ncclComm_t comm = nullptr) {
  if (code == ncclSuccess) return;
  std::string text = std::string(call) + " failed: " + ncclGetErrorString(code);
  const char* details = ncclGetLastError(comm);
  if (details && *details) text += std::string("; ") + details;
  throw NcclError(text);
}

// One rank's end; on the device that is the current one when it is made. All ranks make theirs at
// the same time, and then call the same functions in one order. The destructor leaves NCCL's part
// as it is: to end that takes all ranks, at a time of their own.
class NcclGroup {
 public:
  NcclGroup(const ncclUniqueId& id, int rank, int size) : rank(rank), size(size) {
    check_nccl(ncclCommInitRank(&comm_, size, id, rank), "ncclCommInitRank");
  }
  NcclGroup(const NcclGroup&) = delete;
  NcclGroup& operator=(const NcclGroup&) = delete;

  // To be called by all ranks, once.
  void close() {
    ncclResult_t state;
    const bool fine = ncclCommGetAsyncError(comm_, &state) == ncclSuccess && state == ncclSuccess;
    check_nccl(fine ? ncclCommDestroy(comm_) : ncclCommAbort(comm_), "closing NCCL");
  }

  const int rank, size;

  void all_reduce(void* data, int64_t count, ncclDataType_t type, ncclRedOp_t op,
                  cudaStream_t stream) {
    check();
    check_nccl(ncclAllReduce(data, data, static_cast<size_t>(count), type, op, comm_, stream),
               "ncclAllReduce", comm_);
  }

  // Sends `splits[rank]` bytes to each rank, and receives `received[rank]` bytes from each.
  void all_to_all(const void* from, void* to, const std::vector<int64_t>& splits,
                  const std::vector<int64_t>& received, cudaStream_t stream) {
    check();
    Grouped grouped;
    const char* next = static_cast<const char*>(from);
    char* place = static_cast<char*>(to);
    for (int peer = 0; peer < size; ++peer) {
      const int64_t bytes = splits.at(static_cast<size_t>(peer));
      const int64_t own = received.at(static_cast<size_t>(peer));
      grouped.send(*this, next, bytes, peer, stream);
      grouped.receive(*this, place, own, peer, stream);
      next += bytes;
      place += own;
    }
    grouped.end();
  }

  // Puts the `lengths[rank]` bytes of all ranks end to end.
  void all_gather(const void* from, void* to, const std::vector<int64_t>& lengths,
                  cudaStream_t stream) {
    check();
    Grouped grouped;
    char* next = static_cast<char*>(to);
    const int64_t own = lengths.at(static_cast<size_t>(rank));
    for (int peer = 0; peer < size; ++peer) {
      const int64_t bytes = lengths.at(static_cast<size_t>(peer));
      grouped.send(*this, from, own, peer, stream);
      grouped.receive(*this, next, bytes, peer, stream);
      next += bytes;
    }
    grouped.end();
  }

 private:
  // Sends and receives that are started together, as otherwise they would wait for each other.
  class Grouped {
   public:
    Grouped() { check_nccl(ncclGroupStart(), "ncclGroupStart"); }
    Grouped(const Grouped&) = delete;
    Grouped& operator=(const Grouped&) = delete;
    ~Grouped() {
      if (open_) ncclGroupEnd();
    }
    void send(NcclGroup& group, const void* from, int64_t bytes, int peer, cudaStream_t stream) {
      if (bytes == 0) return;
      check_nccl(ncclSend(from, static_cast<size_t>(bytes), ncclUint8, peer, group.comm_, stream),
                 "ncclSend", group.comm_);
    }
    void receive(NcclGroup& group, void* to, int64_t bytes, int peer, cudaStream_t stream) {
      if (bytes == 0) return;
      check_nccl(ncclRecv(to, static_cast<size_t>(bytes), ncclUint8, peer, group.comm_, stream),
                 "ncclRecv", group.comm_);
    }
    void end() {
      open_ = false;
      check_nccl(ncclGroupEnd(), "ncclGroupEnd");
    }

   private:
    bool open_ = true;
  };

  // What went wrong with an operation after it had been enqueued: a rank has died, say.
  void check() {
    ncclResult_t state;
    check_nccl(ncclCommGetAsyncError(comm_, &state), "ncclCommGetAsyncError", comm_);
    check_nccl(state, "an earlier NCCL operation", comm_);
  }

  ncclComm_t comm_ = nullptr;
};

}  // namespace gqsgd
