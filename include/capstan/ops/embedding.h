// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Embedding lookup into the residual stream.
// Legend: B samples, T tokens, V local vocabulary rows, D hidden features.
#pragma once
#include "capstan/ops/record.h"

namespace capstan::ops {

// ids_BT (int64, global numbers) -> [B, T, D] in `residual` dtype. Ids outside the local part of
// the table give zeros and no gradient, so the sum over the ranks that share a vocabulary is the
// whole result. Ids outside the vocabulary: DataError. The gradient's rows are added in token order
// for any number of threads.
[[nodiscard]] Tensor embedding(const Tensor& ids_BT, const Param& table_VD,
                               at::ScalarType residual);

}  // namespace capstan::ops
