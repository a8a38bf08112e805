// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What libcapstan_cuda.so hands to the program that opened it.
#include "cuda/cuda_accelerator.h"

extern "C" void capstan_cuda_install() {
  // Lives as long as the process: tensors and streams outlast every scope.
  static auto& accelerator = *new capstan::cuda::CudaAccelerator;
  capstan::device::install_accelerator(&accelerator);
}
