// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The forms of attention (ops/attention_choice.h).
#pragma once
#include "capstan/ops/attention.h"
#include "capstan/ops/attention_choice.h"

namespace capstan::ops::cpu {
struct AttentionKernels;
}

namespace capstan::ops::attention_forms {

using Form = AttentionForm;

[[nodiscard]] AttentionCase case_of(const Tensor& q_BTNH, const Tensor& k_BSKH,
                                    const AttentionMask& mask);
[[nodiscard]] Form choose(const Tensor& q_BTNH, const Tensor& k_BSKH, const AttentionMask& mask);

struct Call {
  Tensor q_BTNH, k_BSKH, v_BSKH;
  double scale;
  AttentionMask mask;
  const cpu::AttentionKernels* kernels = nullptr;  // null: those for this processor
};
[[nodiscard]] AttentionParts forward(Form form, const Call& call);
void backward(Form form, const Call& call, const Tensor& grad_BTNH, const AttentionParts& parts,
              const AttentionGrads& into);

[[nodiscard]] AttentionParts reference_forward(const Call& call);
[[nodiscard]] AttentionGrads reference_backward(const Call& call, const Tensor& grad_BTNH,
                                                const AttentionParts& parts);
[[nodiscard]] AttentionParts flash_forward(const Call& call);
[[nodiscard]] AttentionGrads flash_backward(const Call& call, const Tensor& grad_BTNH,
                                            const AttentionParts& parts);
[[nodiscard]] AttentionParts flash_documents_forward(const Call& call);
[[nodiscard]] AttentionGrads flash_documents_backward(const Call& call, const Tensor& grad_BTNH,
                                                      const AttentionParts& parts);
[[nodiscard]] AttentionParts efficient_forward(const Call& call);
[[nodiscard]] AttentionGrads efficient_backward(const Call& call, const Tensor& grad_BTNH,
                                                const AttentionParts& parts);
[[nodiscard]] AttentionParts efficient_documents_forward(const Call& call);
[[nodiscard]] AttentionGrads efficient_documents_backward(const Call& call, const Tensor& grad_BTNH,
                                                          const AttentionParts& parts);
[[nodiscard]] AttentionParts kernel_forward(const Call& call);
void kernel_backward(const Call& call, const Tensor& grad_BTNH, const AttentionParts& parts,
                     const AttentionGrads& into);

}  // namespace capstan::ops::attention_forms
