// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/device_kernels.h"
#include "unit/ops/gpu_kernels.h"

namespace capstan::test {

// start_cuda() installed them.
const kernels::Api* gpu_kernels() { return ops::device_kernels(); }

}  // namespace capstan::test
