// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>

#include "capstan/base/error.h"
#include "capstan/kernels/stream.h"

namespace capstan::kernels {

void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  const bool no_code = error == cudaErrorNoKernelImageForDevice;
  throw EnvError(
      ErrorText{.module = "kernels",
                .what = std::string("launching ") + kernel,
                .got = std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error),
                .need = {},
                .why = no_code ? "the library has code for compute capability 8.0 and 9.0" : "",
                .fix = no_code ? "Build with CMAKE_CUDA_ARCHITECTURES of this GPU" : ""});
}

}  // namespace capstan::kernels
