// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Llama written the ordinary way: autograd leaves and ATen ops only. Shares nothing with nn and
// ops. Also: running a model of nn block by block, each with its own graph, as the engine does.
#pragma once
#include <ATen/core/Tensor.h>

#include <map>
#include <string>

#include "capstan/nn/model.h"
#include "support/plain_store.h"

namespace capstan::nn {

using Weights = std::map<std::string, at::Tensor>;

struct PlainInput {
  at::Tensor ids_BT;
  at::Tensor first_key_BT;  // undefined: joined
  at::Tensor positions_BT;  // undefined: 0 .. T-1
};
[[nodiscard]] at::Tensor plain_logits(const plan::ModelShape& shape, const Weights& weights,
                                      const PlainInput& input);

// Leaves with the values of the store.
[[nodiscard]] Weights leaves_of(testing::PlainStore& store);

struct BlockwiseRun {
  at::Tensor loss, logprob_BT;
};
// Forward, and backward when grad mode is on: detaches between blocks.
BlockwiseRun run_blockwise(const Model& model, const param::RowMap& rows, const at::Tensor& ids_BT,
                           const at::Tensor& targets_BT, const at::Tensor& weights_BT);

}  // namespace capstan::nn
