// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "param/cpu/fill_normal.h"

#include "capstan/device/isa.h"

namespace capstan::param::cpu {

const FillNormal& fill_normal() {
  switch (device::isa_level()) {
    case device::Isa::kPlain:
      return plain::kFillNormal;
    case device::Isa::kAvx2:
      return avx2::kFillNormal;
    case device::Isa::kAvx512:
    case device::Isa::kAvx512Bf16:
    case device::Isa::kAmx:
      return avx512::kFillNormal;
  }
  return plain::kFillNormal;
}

}  // namespace capstan::param::cpu
