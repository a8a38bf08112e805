// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Tokens into the order of their experts and back. Legend: N tokens, k choices of a token, E
// experts, R rows (choices that were kept), D features.
#pragma once
#include <cstdint>
#include <vector>

#include "capstan/ops/record.h"

namespace capstan::ops {

// Kept choices sorted by expert, within an expert by token. Where the host does not know how many
// were kept, R is all N k: rows behind the last end are nobody's, and hold anything.
struct ExpertOrder {
  Tensor slot_R;                  // int64, token x k + choice
  Tensor place_Nk;                // int64, row of each choice; -1 where it was dropped
  std::vector<int64_t> counts_E;  // rows of each expert; empty where the host does not know them
  Tensor ends_E;            // int32, the row behind each expert's last; undefined where it does
  int64_t padded_rows = 0;  // > 0: R, and nobody's rows are zero
};
// keep_Nk: bool, undefined = all. on_device: counts stay there, and the host does not wait for
// them; only where grouped_case() has an order.
[[nodiscard]] ExpertOrder order_by_expert(const Tensor& experts_Nk, const Tensor& keep_Nk,
                                          int64_t experts, bool on_device = false);

// The same rows, those of expert e from row e x room on, which nobody may have more of: shapes that
// depend on no choice. Nobody's rows lie between them; permute_tokens() and the gradient of
// combine_rows() make them zero. For orders whose counts are on the device.
[[nodiscard]] ExpertOrder with_room(const ExpertOrder& order, const Tensor& experts_Nk,
                                    int64_t room);

// [N, D] -> [R, D]; nobody's rows are not written. The gradient of a token is summed in the order
// of its choices.
[[nodiscard]] Tensor permute_tokens(const Tensor& x_ND, const ExpertOrder& order);

// [R, D], weights [N, k] -> [N, D]: sum over the choices, in their order, of weight x row, in at
// least fp32; 0 for a token without any. Differentiable in both; nobody's rows are neither read nor
// given a gradient.
[[nodiscard]] Tensor combine_rows(const Tensor& y_RD, const Tensor& weights_Nk,
                                  const ExpertOrder& order);

}  // namespace capstan::ops
