// As much of NCCL as hvd_gqsgd needs, on the CPU: over MPI, for tests where there is no GPU. A
// group of sends and receives is started as a whole, as NCCL does.
#pragma once

#include <cuda_runtime.h>
#include <mpi.h>

#include <cstring>
#include <vector>

enum ncclResult_t { ncclSuccess, ncclSystemError };
enum ncclDataType_t { ncclUint8, ncclInt32, ncclInt64 };
enum ncclRedOp_t { ncclSum, ncclMax };

struct ncclUniqueId {
  char internal[128];
};

struct ncclComm {
  MPI_Comm comm;
};
using ncclComm_t = ncclComm*;

namespace emulated {

inline std::vector<MPI_Request> requests;
inline bool grouped = false;

inline ncclResult_t result(int code) { return code == MPI_SUCCESS ? ncclSuccess : ncclSystemError; }

inline MPI_Datatype type_of(ncclDataType_t type) {
  return type == ncclUint8 ? MPI_UINT8_T : type == ncclInt32 ? MPI_INT32_T : MPI_INT64_T;
}

}  // namespace emulated

inline const char* ncclGetErrorString(ncclResult_t) { return "system error"; }
inline const char* ncclGetLastError(ncclComm_t) { return "MPI has failed"; }

// Something to recognize: every rank must get what one of them was given.
inline ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  for (size_t i = 0; i < sizeof(id->internal); ++i) id->internal[i] = static_cast<char>(i * 37 + 5);
  return ncclSuccess;
}

inline ncclResult_t ncclCommInitRank(ncclComm_t* to, int size, ncclUniqueId id, int rank) {
  ncclUniqueId expected;
  ncclGetUniqueId(&expected);
  if (memcmp(&id, &expected, sizeof(id)) != 0) return ncclSystemError;
  int real_rank, real_size;
  *to = new ncclComm;
  const ncclResult_t code = emulated::result(MPI_Comm_dup(MPI_COMM_WORLD, &(*to)->comm));
  MPI_Comm_rank((*to)->comm, &real_rank);
  MPI_Comm_size((*to)->comm, &real_size);
  return real_rank == rank && real_size == size ? code : ncclSystemError;
}

inline ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  int finalized;
  MPI_Finalized(&finalized);
  if (!finalized) MPI_Comm_free(&comm->comm);
  delete comm;
  return ncclSuccess;
}

inline ncclResult_t ncclCommAbort(ncclComm_t comm) { return ncclCommDestroy(comm); }

inline ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* state) {
  *state = ncclSuccess;
  return ncclSuccess;
}

inline ncclResult_t ncclAllReduce(const void* from, void* to, size_t count, ncclDataType_t type,
                                  ncclRedOp_t op, ncclComm_t comm, cudaStream_t) {
  return emulated::result(MPI_Allreduce(from == to ? MPI_IN_PLACE : from, to,
                                        static_cast<int>(count), emulated::type_of(type),
                                        op == ncclMax ? MPI_MAX : MPI_SUM, comm->comm));
}

inline ncclResult_t ncclGroupStart() {
  emulated::grouped = true;
  return ncclSuccess;
}
inline ncclResult_t ncclGroupEnd() {
  const int count = static_cast<int>(emulated::requests.size());
  const int code = MPI_Waitall(count, emulated::requests.data(), MPI_STATUSES_IGNORE);
  emulated::requests.clear();
  emulated::grouped = false;
  return emulated::result(code);
}

inline ncclResult_t ncclSend(const void* from, size_t count, ncclDataType_t type, int peer,
                             ncclComm_t comm, cudaStream_t) {
  if (!emulated::grouped) emulated::fail("a send would wait for its receive");
  return emulated::result(MPI_Isend(from, static_cast<int>(count), emulated::type_of(type), peer, 0,
                                    comm->comm, &emulated::requests.emplace_back()));
}
inline ncclResult_t ncclRecv(void* to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                             cudaStream_t) {
  if (!emulated::grouped) emulated::fail("a receive would wait for its send");
  return emulated::result(MPI_Irecv(to, static_cast<int>(count), emulated::type_of(type), peer, 0,
                                    comm->comm, &emulated::requests.emplace_back()));
}
