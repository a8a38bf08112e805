// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Runs any op on the fake device with the CPU's kernel, on the device's memory.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

namespace capstan::test::fake {

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack);

}  // namespace capstan::test::fake
