// NCCL as torch ops, in the library of the kernels for GPUs.
#include "torch/cuda_device.h"
#include "torch/nccl_class.h"

TORCH_LIBRARY_FRAGMENT(hvd_gqsgd, m) { gqsgd::NcclCommunicator<gqsgd::Cuda>::register_all(m); }
