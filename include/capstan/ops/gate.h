// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "capstan/ops/record.h"

namespace capstan::ops {

// sigmoid(logit) * y: y [..., D], one logit [..., 1] for each row.
[[nodiscard]] Tensor gated(const Tensor& y, const Tensor& logit);

}  // namespace capstan::ops
