// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// All-to-all context parallel (Ulysses): one exchange gives each rank whole rows of a part of the
// heads, ordinary attention runs on them, a second exchange gives the tokens back. Key/value heads
// that are fewer than the ranks go to several of them, and their gradients are summed.
#pragma once
#include "parallel/ring_attention_internal.h"

namespace capstan::parallel {

// As ring_attention. Query heads must divide by the ranks; key/value heads and ranks must divide
// one another. Collective over: the context axis.
[[nodiscard]] Tensor all_to_all_attention(const ContextAttention& call, const Tensor& qkv_BtX);

}  // namespace capstan::parallel
