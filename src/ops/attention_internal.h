// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The forms of attention: plain math (every dtype, mask and device), LibTorch's flash kernels of
// CPUs and GPUs (joined causal rows), our kernel.
#pragma once
#include "capstan/ops/attention.h"

namespace capstan::ops::attention_forms {

enum class Form { kReference, kLibTorch, kKernel, kFlash };

// What runs: the reference when asked for; on CPUs our kernel for fp32, bf16, fp64, else LibTorch's
// where it can; on GPUs FlashAttention for bf16 and fp16 rows without documents.
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
[[nodiscard]] bool flash_takes(const Tensor& q_BTNH, const Tensor& k_BSKH,
                               const AttentionMask& mask);
[[nodiscard]] AttentionParts flash_forward(const Call& call);
[[nodiscard]] AttentionGrads flash_backward(const Call& call, const Tensor& grad_BTNH,
                                            const AttentionParts& parts);
[[nodiscard]] AttentionParts kernel_forward(const Call& call);
void kernel_backward(const Call& call, const Tensor& grad_BTNH, const AttentionParts& parts,
                     const AttentionGrads& into);

}  // namespace capstan::ops::attention_forms
