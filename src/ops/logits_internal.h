// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <ATen/core/Tensor.h>

#include "capstan/ops/head.h"

namespace capstan::ops {

// fp64 for fp64, else fp32: the dtype of statistics, losses and scales.
[[nodiscard]] at::ScalarType wide_dtype_of(const at::Tensor& x);

// logprob_N = log p(target), 0 where ignored; with weights the logits become their gradient in the
// same pass.
void cross_entropy_(const at::Tensor& logits_NV, const at::Tensor& targets_N,
                    const at::Tensor& weights_N, const at::Tensor& logprob_N);

// Targets, with labels in place of those that are not ignored (head_weighted_loss). int64 [n].
[[nodiscard]] at::Tensor draw_labels(const at::Tensor& logits_nV, const at::Tensor& targets_n,
                                     const at::Tensor& uniform_n, int64_t first_row,
                                     const VocabularyCut& cut);

}  // namespace capstan::ops
