// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "capstan/kernels/api.h"

namespace capstan::test {

// Our kernels on the device of gpu_*_test.cpp.
[[nodiscard]] const kernels::Api* gpu_kernels();

}  // namespace capstan::test
