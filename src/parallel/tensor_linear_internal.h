// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Linear layers and the vocabulary cut over the tensor axis (of at least two ranks). Collective
// over: the tensor axis, all of them. Legend: B samples, T tokens, D input features, O output
// features, V vocabulary.
#pragma once
#include <ATen/core/Tensor.h>

#include <span>
#include <vector>

#include "capstan/nn/seams.h"
#include "capstan/ops/head.h"
#include "capstan/parallel/parallel_seams.h"

namespace capstan::parallel {

// Output features are cut: every rank reads all of x. Under sequence parallel x is gathered once
// for all projections, only this rank's tokens of it are kept for the backward, and the weight
// gradient gathers them again when it runs (inside the deferred half of a zero-bubble backward:
// ranks of one tensor axis run the same instructions in the same order).
[[nodiscard]] std::vector<Tensor> column_linear(const TensorCut& cut, const Tensor& x_BTD,
                                                std::span<const nn::Projection> projections);

// The same for one projection and GELU behind it.
[[nodiscard]] ops::Activated column_gelu_linear(const TensorCut& cut, const Tensor& x_BTD,
                                                const nn::Projection& projection,
                                                ops::GeluForm form);

// Input features are cut: the sum over the ranks is the result; the bias is added once, after it.
[[nodiscard]] Tensor row_linear(const TensorCut& cut, const Tensor& y_BTO,
                                const nn::Projection& projection);
[[nodiscard]] Tensor row_linear(const TensorCut& cut, const ops::Activated& y_BTO,
                                const nn::Projection& projection);

// Every rank looks up the rows it holds; the sum over the ranks is the result.
[[nodiscard]] Tensor vocabulary_embedding(const TensorCut& cut, const Tensor& ids_BT,
                                          const nn::Param& table_VD, at::ScalarType residual);

// The steps between ranks of the head.
[[nodiscard]] ops::VocabularyCut vocabulary_cut(const TensorCut& cut);
// [..., V] of the whole vocabulary; x is the same on every rank. No gradient.
[[nodiscard]] Tensor vocabulary_logits(const TensorCut& cut, const Tensor& x,
                                       const nn::Projection& head);

}  // namespace capstan::parallel
