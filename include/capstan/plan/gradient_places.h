// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Gradient memory where the optimizer runs in the backward, when gradients are summed over ranks:
// what a block has written travels while the next block writes, so neighbouring blocks have
// different places.
#pragma once
#include "capstan/plan/grid.h"
#include "capstan/plan/layout.h"

namespace capstan::plan {

// Whether any gradient of the rank goes to other ranks.
[[nodiscard]] bool sums_over_ranks(const Grid& grid, const RankLayout& layout);
// share_gradients(), with two places that trainable blocks take in turn where sums go over ranks.
[[nodiscard]] SharedGradients place_gradients(const Grid& grid, const RankLayout& layout, bool tied,
                                              int zero_stage);

}  // namespace capstan::plan
