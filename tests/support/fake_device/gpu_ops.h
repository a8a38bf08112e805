// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Ops that LibTorch has for GPUs alone, from their definitions: what they refuse there, they refuse
// here. Legend: B samples, T queries, S keys, N query heads, K key/value heads, H head size, G
// tokens of all samples.
#pragma once
#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/operator_name.h>

namespace capstan::test::fake {

// A kernel for the CPU tensors over device memory; null for ops that CPUs have.
[[nodiscard]] const c10::KernelFunction* gpu_op(const c10::OperatorName& name);

}  // namespace capstan::test::fake
