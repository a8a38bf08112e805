// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "optim/cpu/kernels.h"

#include "capstan/device/isa.h"

namespace capstan::optim::cpu {

const Kernels& kernels() {
  switch (device::isa_level()) {
    case device::Isa::kPlain:
      return plain::kKernels;
    case device::Isa::kAvx2:
      return avx2::kKernels;
    case device::Isa::kAvx512:
    case device::Isa::kAvx512Bf16:
    case device::Isa::kAmx:
      return avx512::kKernels;
  }
  return plain::kKernels;
}

}  // namespace capstan::optim::cpu
