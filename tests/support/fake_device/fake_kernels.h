// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The kernels of kernels/ on the fake device: run by the host emulator of the SIMT model on the
// bytes behind device pointers.
#pragma once
#include "capstan/kernels/api.h"

namespace capstan::test {

[[nodiscard]] const kernels::Api& fake_kernels();

}  // namespace capstan::test
