// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "parallel/ring_exchange_internal.h"

#include <ATen/ATen.h>

#include <utility>

namespace capstan::parallel {

RingExchange::RingExchange(const comm::Communicator& group, const Tensor& x)
    : arriving_(at::empty(x.sizes(), x.options().requires_grad(false))) {
  const int n = group.size(), rank = group.rank();
  sent_ = group.send(x, (rank + 1) % n);
  received_ = group.recv(arriving_, (rank + n - 1) % n);
}

Tensor RingExchange::finish() {
  received_.wait();
  sent_.wait();
  return std::move(arriving_);
}

void ring_gather(const comm::Communicator& group, const Tensor& part,
                 const std::function<void(int, const Tensor&)>& visit) {
  const int n = group.size();
  Tensor here = part.detach().contiguous();
  for (int hop = 0; hop < n; ++hop) {
    const bool is_last = hop + 1 == n;
    RingExchange next = is_last ? RingExchange() : RingExchange(group, here);
    visit((group.rank() + n - hop) % n, here);
    if (!is_last) here = next.finish();
  }
}

// The sum for rank r starts at rank r + 1 and arrives at r after n - 1 hops.
Tensor ring_reduce(const comm::Communicator& group, const std::function<Tensor(int)>& make) {
  const int n = group.size();
  RingExchange under_way;
  for (int hop = 0;; ++hop) {
    const Tensor part = make((group.rank() + 2 * n - 1 - hop) % n);
    const auto dtype = part.scalar_type();
    Tensor sum = part.element_size() < 4 ? part.to(at::kFloat) : part;
    if (hop > 0) sum.add_(under_way.finish());
    if (hop + 1 == n) return sum.to(dtype);
    under_way = RingExchange(group, sum);
  }
}

}  // namespace capstan::parallel
