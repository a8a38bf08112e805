// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Tokens cut over the tensor axis, gathered and reduced. Legend: B samples, T tokens, t = T / p
// tokens of one of the p ranks.
#pragma once
#include <ATen/core/Tensor.h>

#include "capstan/comm/communicator.h"

namespace capstan::parallel {

using at::Tensor;

// [B, t, ...] of each rank -> [B, T, ...], under way from the constructor on. Collective over:
// group.
class SequenceGather {
 public:
  SequenceGather(const comm::Communicator& group, const Tensor& x_BtD);
  [[nodiscard]] Tensor finish();  // waits

 private:
  Tensor parts_pBtD_;
  comm::Work work_;
};

// Sums [B, T, ...] over the ranks and keeps this rank's [B, t, ...]. Collective over: group.
class SequenceReduce {
 public:
  SequenceReduce(const comm::Communicator& group, const Tensor& x_BTD);
  [[nodiscard]] Tensor finish();  // waits

 private:
  Tensor part_BtD_;
  comm::Work work_;
};

[[nodiscard]] Tensor gather_sequence(const comm::Communicator& group, const Tensor& x_BtD);
[[nodiscard]] Tensor reduce_sequence(const comm::Communicator& group, const Tensor& x_BTD);

// Parts in rank order [p, B, t, ...] <-> tokens in order [B, T, ...]. A view when B is 1.
[[nodiscard]] Tensor tokens_of_parts(const Tensor& parts_pBtD);
[[nodiscard]] Tensor parts_of_tokens(const Tensor& x_BTD, int64_t ranks);  // contiguous

}  // namespace capstan::parallel
