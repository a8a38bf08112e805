// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The products of grouped_linear() as one for all groups. Callers hold a NoGradGuard. Legend: R
// rows, D input features, O output features, G groups.
#pragma once
#include <vector>

#include "capstan/ops/record.h"

namespace capstan::ops::grouped_product {

using Projections = std::vector<Projection>;

// ends: int32 [G]. All [R, ...]; rows behind the last end hold anything.
[[nodiscard]] Tensor forward(const Tensor& x_RD, const Projections& projections,
                             const Tensor& ends);
// grad_RO: contiguous.
[[nodiscard]] Tensor input_gradient(const Tensor& grad_RO, const Projections& projections,
                                    const Tensor& ends);
// One product when the first of the gradients is added, one addition for each weight.
void add_weight_gradients(const Tensor& grad_RO, const Tensor& x_RD, const Projections& projections,
                          const Tensor& ends);
// Groups of as many rows each, of which there are some; all weights are trainable. One product adds
// to the buffers in their own type where they lie equally far apart, else one for each.
void add_equal_gradients(const Tensor& grad_RO, const Tensor& x_RD, const Projections& projections);

}  // namespace capstan::ops::grouped_product
