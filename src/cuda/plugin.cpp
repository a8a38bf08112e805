// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What libcapstan_cuda.so hands to the program that opened it.
#include "capstan/comm/nccl.h"
#include "capstan/ops/device_kernels.h"
#include "capstan/ops/lt_api.h"
#include "cuda/cuda_accelerator.h"
#include "cuda/lt_api.h"
#include "cuda/nccl_api.h"

extern "C" void capstan_cuda_install() {
  // Lives as long as the process: tensors and streams outlast every scope.
  static auto& accelerator = *new capstan::cuda::CudaAccelerator;
  capstan::device::install_accelerator(&accelerator);
  capstan::ops::install_device_kernels(&capstan::kernels::cuda_api());
  capstan::ops::install_lt_api(capstan::cuda::make_lt_api());
  capstan::comm::install_nccl_api(capstan::cuda::make_nccl_api());
}
