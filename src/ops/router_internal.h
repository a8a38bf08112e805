// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "capstan/ops/router.h"

namespace capstan::ops {

void check_router(const RouterSpec& spec, int64_t experts);
// The k best experts of each token, int64 [N, k].
[[nodiscard]] Tensor choose_experts(const Tensor& scores_NE, const Tensor& bias_E,
                                    const RouterSpec& spec);

}  // namespace capstan::ops
