// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "capstan/ops/router.h"

namespace capstan::ops {

void check_router(const RouterSpec& spec, int64_t experts);
// The k best experts of each token, int64 [N, k].
[[nodiscard]] Tensor choose_experts(const Tensor& scores_NE, const Tensor& bias_E,
                                    const RouterSpec& spec);

// keep_within_capacity() by sorting, for tensors of any one device; what is no whole row is not
// noticed. The host does not wait.
[[nodiscard]] Tensor keep_by_sort(const Tensor& experts_Nk, const Tensor& row_N,
                                  const Tensor& place_N, const CapacitySpec& spec);

}  // namespace capstan::ops
