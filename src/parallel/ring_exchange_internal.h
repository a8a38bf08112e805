// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Tensors that go round a group, rank by rank, while something is computed.
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>

#include "capstan/comm/communicator.h"

namespace capstan::parallel {

using at::Tensor;

// One hop under way: to the next rank, from the one before. What is sent may be read meanwhile, not
// written.
class RingExchange {
 public:
  RingExchange() = default;
  // Issues the send and the receive before either is waited for. Collective over: group.
  RingExchange(const comm::Communicator& group, const Tensor& x);
  [[nodiscard]] Tensor finish();  // waits for both; what arrived

 private:
  Tensor arriving_;
  comm::Work sent_, received_;
};

// Calls visit(rank, part) for the part of every rank, this rank's first; the next part travels
// meanwhile. Collective over: group.
void ring_gather(const comm::Communicator& group, const Tensor& part,
                 const std::function<void(int rank, const Tensor& part)>& visit);

// The sum over the ranks of make(r), for r = this rank. The sum for another rank travels while the
// next one is made; it is kept in at least fp32 and has the dtype of make's at the end. make must
// return fresh tensors. Collective over: group.
[[nodiscard]] Tensor ring_reduce(const comm::Communicator& group,
                                 const std::function<Tensor(int rank)>& make);

}  // namespace capstan::parallel
