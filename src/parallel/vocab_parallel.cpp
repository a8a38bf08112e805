// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Embedding and head with the vocabulary cut over the tensor axis. Legend: B samples, T tokens, N
// tokens, D hidden features, V vocabulary, v rows of it per rank, padding included.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "capstan/base/check.h"
#include "capstan/ops/embedding.h"
#include "capstan/ops/linear.h"
#include "parallel/sequence_cut_internal.h"
#include "parallel/tensor_linear_internal.h"

namespace capstan::parallel {
namespace {

Tensor summed_lookup(const TensorCut& cut, const Tensor& part) {
  at::NoGradGuard no_grad;
  if (cut.sequence) return reduce_sequence(cut.group, part);
  const Tensor sum = part.detach();  // in place: nobody else sees the lookup
  cut.group.all_reduce(sum).wait();
  return sum;
}

}  // namespace

Tensor vocabulary_embedding(const TensorCut& cut, const Tensor& ids, const nn::Param& table,
                            at::ScalarType residual) {
  const Tensor part = ops::embedding(ids, table, residual);
  return ops::record(summed_lookup(cut, part),
                     {"vocabulary_embedding",
                      {part},
                      {},
                      {},
                      [cut](const ops::Tensors&, ops::Tensors& grads) -> ops::Tensors {
                        at::NoGradGuard no_grad;
                        return {cut.sequence ? gather_sequence(cut.group, grads[0]) : grads[0]};
                      }});
}

ops::VocabularyCut vocabulary_cut(const TensorCut& cut) {
  const comm::Communicator group = cut.group;
  ops::VocabularyCut steps;
  steps.max = [group](const Tensor& x) { group.all_reduce(x, comm::ReduceOp::kMax).wait(); };
  steps.sum = [group](const Tensor& x) { group.all_reduce(x).wait(); };
  steps.ranks = group.size();
  steps.rank = group.rank();
  if (cut.sequence) {
    steps.gather = [group](const Tensor& x) { return gather_sequence(group, x); };
    steps.reduce = [group](const Tensor& dx) { return reduce_sequence(group, dx); };
  } else {
    steps.reduce = [group](const Tensor& dx) {
      group.all_reduce(dx).wait();
      return dx;
    };
  }
  return steps;
}

Tensor vocabulary_logits(const TensorCut& cut, const Tensor& x, const nn::Projection& head) {
  at::NoGradGuard no_grad;
  CAPSTAN_CHECK(head.parts.size() == 1, "the head has one weight, got {}", head.parts.size());
  const plan::LocalParam& local = head.parts[0].local();
  const int64_t rows = local.local_shape.at(0), vocab = head.parts[0].spec().shape.at(0);
  CAPSTAN_CHECK(local.real.begin.at(0) == std::min(rows * cut.group.rank(), vocab),
                "rank {} of the tensor axis holds the vocabulary from row {} in parts of {}",
                cut.group.rank(), local.real.begin.at(0), rows);
  const Tensor part = ops::linear_forward(x.detach(), head.weight(), {}).view({-1, rows});
  const Tensor parts_pNv = at::empty({cut.group.size(), part.size(0), rows}, part.options());
  cut.group.all_gather(parts_pNv, part).wait();
  // Padding stands behind the last real row, so it is cut off in one piece.
  const Tensor whole_NV =
      parts_pNv.transpose(0, 1).reshape({part.size(0), -1}).narrow(1, 0, vocab).contiguous();
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = vocab;
  return whole_NV.view(sizes);
}

}  // namespace capstan::parallel
