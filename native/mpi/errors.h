// Return codes of MPI as exceptions with MPI's own text. Whether a call returns at all after an
// error is up to the error handler of the communicator; mpi4py sets MPI_ERRORS_RETURN.
#pragma once

#include <mpi.h>

#include <stdexcept>
#include <string>

namespace gqsgd {

class MpiError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

inline void check_mpi(int code, const char* call) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = "";
  int length = 0;
  MPI_Error_string(code, text, &length);
  throw MpiError(std::string(call) + " failed: " + text);
}

}  // namespace gqsgd
