// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Our kernels for the accelerator's tensors: a plug-in brings them, tests bring imitations. Without
// them ops off the CPU take the reference form, which ATen has for every device.
#pragma once
#include "capstan/kernels/api.h"

namespace capstan::ops {

// Null until a plug-in installed them.
[[nodiscard]] const kernels::Api* device_kernels();
// Before the first op on the device. `api` must outlive the process's last op.
void install_device_kernels(const kernels::Api* api);

}  // namespace capstan::ops
