// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// aten::_efficient_attention_forward and _backward from their definitions, what they refuse and do
// not do included. Legend beside gpu_ops.h: E sequences with lengths, R places of a row of the
// log-sum-exp.
#pragma once
#include <ATen/core/boxing/KernelFunction.h>

namespace capstan::test::fake {

[[nodiscard]] c10::KernelFunction efficient_attention_forward();
[[nodiscard]] c10::KernelFunction efficient_attention_backward();
[[nodiscard]] int64_t efficient_calls_with_lengths();  // of the forward, so far

}  // namespace capstan::test::fake
