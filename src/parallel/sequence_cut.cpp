// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <ATen/ATen.h>

#include "capstan/base/check.h"
#include "parallel/sequence_cut_internal.h"

namespace capstan::parallel {

Tensor tokens_of_parts(const Tensor& parts) {
  std::vector<int64_t> sizes = parts.sizes().slice(1).vec();
  sizes[1] *= parts.size(0);
  return parts.transpose(0, 1).reshape(sizes);
}

Tensor parts_of_tokens(const Tensor& x, int64_t ranks) {
  CAPSTAN_CHECK(x.dim() >= 2 && x.size(1) % ranks == 0,
                "{} tokens of a row do not divide over {} ranks of the tensor axis", x.size(1),
                ranks);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes[1] /= ranks;
  sizes.insert(sizes.begin() + 1, ranks);
  return x.reshape(sizes).transpose(0, 1).contiguous();
}

SequenceGather::SequenceGather(const comm::Communicator& group, const Tensor& x) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.insert(sizes.begin(), group.size());
  parts_pBtD_ = at::empty(sizes, x.options().requires_grad(false));
  work_ = group.all_gather(parts_pBtD_, x.contiguous());
}

Tensor SequenceGather::finish() {
  work_.wait();
  return tokens_of_parts(parts_pBtD_);
}

SequenceReduce::SequenceReduce(const comm::Communicator& group, const Tensor& x) {
  const Tensor parts_pBtD = parts_of_tokens(x, group.size());
  part_BtD_ = at::empty(parts_pBtD.sizes().slice(1), parts_pBtD.options().requires_grad(false));
  work_ = group.reduce_scatter(part_BtD_, parts_pBtD);
}

Tensor SequenceReduce::finish() {
  work_.wait();
  return part_BtD_;
}

Tensor gather_sequence(const comm::Communicator& group, const Tensor& x) {
  return SequenceGather(group, x).finish();
}

Tensor reduce_sequence(const comm::Communicator& group, const Tensor& x) {
  return SequenceReduce(group, x).finish();
}

}  // namespace capstan::parallel
