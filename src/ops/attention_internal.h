// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The three forms of attention: plain math (every dtype and mask), LibTorch's flash kernel (joined
// causal rows), our kernel.
#pragma once
#include "capstan/ops/attention.h"

namespace capstan::ops::attention_forms {

enum class Form { kReference, kLibTorch, kKernel };

// What runs: the reference when asked for; our kernel for fp32, bf16, fp64; else LibTorch's where
// it can.
[[nodiscard]] Form choose(const Tensor& q_BTNH, const Tensor& k_BSKH, const AttentionMask& mask);

struct Call {
  Tensor q_BTNH, k_BSKH, v_BSKH;
  double scale;
  AttentionMask mask;
};
[[nodiscard]] AttentionParts forward(Form form, const Call& call);
void backward(Form form, const Call& call, const Tensor& grad_BTNH, const AttentionParts& parts,
              const AttentionGrads& into);

[[nodiscard]] AttentionParts reference_forward(const Call& call);
[[nodiscard]] AttentionGrads reference_backward(const Call& call, const Tensor& grad_BTNH,
                                                const AttentionParts& parts);
[[nodiscard]] AttentionParts kernel_forward(const Call& call);
void kernel_backward(const Call& call, const Tensor& grad_BTNH, const AttentionParts& parts,
                     const AttentionGrads& into);

}  // namespace capstan::ops::attention_forms
