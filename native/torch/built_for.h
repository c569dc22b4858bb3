// The PyTorch whose headers a library was compiled with: it may load with another one, and crash
// later. One source file of each library includes this; hvd_gqsgd/_native/loader.py reads it.
#pragma once

#include <torch/version.h>

extern "C" __attribute__((visibility("default"))) const char* hvd_gqsgd_built_for_torch() {
  return TORCH_VERSION;
}
