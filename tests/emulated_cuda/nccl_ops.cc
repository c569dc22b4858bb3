// The class of native/torch/nccl.cc on emulated CUDA and NCCL, for tensors on the CPU.
#include "emulated_device.h"
#include "torch/nccl_class.h"

TORCH_LIBRARY_FRAGMENT(hvd_gqsgd_emulated, m) {
  gqsgd::NcclCommunicator<gqsgd::Emulated>::register_all(m);
}
