// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <ATen/core/Tensor.h>

#include <cstddef>

namespace capstan::optim {

// Bytes by way of pinned memory, whose copy to the device is queued like a kernel.
[[nodiscard]] at::Tensor to_device(const void* bytes, size_t count);

}  // namespace capstan::optim
