// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Routers and the order of experts by our kernels: the device forms of router.cpp and permute.cpp.
// Callers chose Path::kDevice; tensors are on the device. Legend: N tokens, k choices of a token, E
// experts, R rows, D features, S rows of the micro-batch.
#pragma once
#include "capstan/ops/permute.h"
#include "capstan/ops/router.h"

namespace capstan::ops::on_device {

// Whether the kernels have room for such a router: 512 experts, 32 choices and 32 groups.
[[nodiscard]] bool takes_router(const RouterSpec& spec, int64_t experts);
// Whether they have room for an order: 1024 experts and int32 rows.
[[nodiscard]] bool takes_order(int64_t slots, int64_t experts);

// Scores, choice and weights from logits_NE (fp32 or fp64, contiguous).
void fill_routing(Routing& routing, const Tensor& bias_E, const RouterSpec& spec);
[[nodiscard]] Tensor logit_gradient(const Tensor& grad_Nk, const Tensor& logits_NE,
                                    const Tensor& experts_Nk, const RouterSpec& spec,
                                    const RouterLoss& loss);

// The host waits once, for the counts, unless they stay on the device.
[[nodiscard]] ExpertOrder order_by_expert(const Tensor& experts_Nk, const Tensor& keep_Nk,
                                          int64_t experts, bool keeps_counts);
[[nodiscard]] Tensor permute_tokens(const Tensor& x_ND, const ExpertOrder& order);
// weights_Nk undefined: ones.
[[nodiscard]] Tensor sum_of_rows(const Tensor& rows_RD, const Tensor& weights_Nk,
                                 const Tensor& place_Nk);
// Gradients of the rows and of the weights.
[[nodiscard]] Tensors split_gradients(const Tensor& grad_ND, const Tensor& rows_RD,
                                      const Tensor& weights_Nk, const ExpertOrder& order);

}  // namespace capstan::ops::on_device
