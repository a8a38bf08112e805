// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What the device forms of ops share: dtypes and stream as the kernels name them.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "capstan/base/dtype.h"
#include "capstan/device/accelerator.h"
#include "capstan/ops/device_kernels.h"

namespace capstan::ops::on_device {

// fp64, fp32 and bf16: what all kernels know.
[[nodiscard]] inline std::optional<DType> dtype_of(at::ScalarType type) {
  switch (type) {
    case at::ScalarType::Double:
      return DType::kFp64;
    case at::ScalarType::Float:
      return DType::kFp32;
    case at::ScalarType::BFloat16:
      return DType::kBf16;
    default:
      return std::nullopt;
  }
}
[[nodiscard]] inline std::optional<DType> dtype_of(const at::Tensor& x) {
  return dtype_of(x.scalar_type());
}

[[nodiscard]] inline std::string_view name_of_type(at::ScalarType type) {
  const auto ours = dtype_of(type);
  return ours ? name_of(*ours) : c10::toString(type);
}

[[nodiscard]] inline kernels::Stream stream() {
  return static_cast<kernels::Stream>(device::accelerator()->current_stream().handle);
}

}  // namespace capstan::ops::on_device
