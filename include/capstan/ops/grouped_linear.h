// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Consecutive runs of rows, each multiplied with a weight of its own. Legend: R rows, D input
// features, O output features.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "capstan/ops/record.h"

namespace capstan::ops {

// x [R, D] -> [R, O]; the first rows[0] rows by projections[0], and so on. No biases. Every weight
// gets its gradient in every backward, also from no rows, so that ranks agree on the passes.
[[nodiscard]] Tensor grouped_linear(const Tensor& x_RD, std::span<const Projection> projections,
                                    const std::vector<int64_t>& rows);

}  // namespace capstan::ops
