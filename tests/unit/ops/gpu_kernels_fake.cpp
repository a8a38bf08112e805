// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "support/fake_device/fake_kernels.h"
#include "unit/ops/gpu_kernels.h"

namespace capstan::test {

const kernels::Api* gpu_kernels() { return &fake_kernels(); }

}  // namespace capstan::test
