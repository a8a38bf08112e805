// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Consecutive runs of rows, each multiplied with a weight of its own. Legend: R rows, D input
// features, O output features, G groups.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "capstan/ops/record.h"

namespace capstan::ops {

// The first counts[0] rows are those of weight 0, and so on.
struct RowGroups {
  std::vector<int64_t> counts;  // [G], their sum is R; empty where only the device knows them
  // int32 [G] on the rows' device: the row behind each run. Where it is defined one product takes
  // all groups (choose_grouped() has to allow it) and nothing waits; else there is one for each.
  // With counts beside them gradients of weights are a product for each, or one of all that adds
  // to the buffers where the counts are equal.
  Tensor ends;
};
// The ends of counts that the host knows, queued to the device.
[[nodiscard]] RowGroups with_ends(std::vector<int64_t> counts, c10::Device device);
// Runs of as many rows each.
[[nodiscard]] RowGroups equal_groups(int64_t groups, int64_t rows, c10::Device device);

// x [R, D] -> [R, O]. No biases. Every weight gets its gradient in every backward, also from no
// rows, so that ranks agree on the passes. Rows behind the last end are not read, and hold anything
// in the result and in the gradient of x. Without counts the gradient of a weight is rounded to the
// type of x before it is added to the buffer; with them it is that of a linear layer.
[[nodiscard]] Tensor grouped_linear(const Tensor& x_RD, std::span<const Projection> projections,
                                    const RowGroups& groups);

}  // namespace capstan::ops
