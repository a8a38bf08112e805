// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A small Llama run block by block on every rank of a tensor x context grid and compared, tensor by
// tensor, with the same model on one rank and the base Seams.
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "capstan/mesh/mesh.h"
#include "capstan/nn/model.h"
#include "capstan/parallel/parallel_seams.h"
#include "ranks/parallel/layout_store.h"

namespace capstan::test {

struct SeamsCase {
  int tp = 1, cp = 1;
  bool sequence = false, all_to_all = false, overlap = false;
  bool gloo = false;                                          // instead of the threads backend
  bool documents = false, deferred = false, entropy = false;  // entropy: ordinary scores as well
  std::optional<int64_t> window;
  bool bias = false, tied = false;
  int64_t vocab = 37, vocab_multiple = 4, heads = 8, key_value_heads = 2;
  int64_t samples = 2, tokens = 32;
  std::vector<int> frozen_blocks = {};
  at::ScalarType dtype = at::ScalarType::Double;
  double tolerance = 1e-11;

  [[nodiscard]] int ranks() const { return tp * cp; }
  [[nodiscard]] std::string text() const;
};
[[nodiscard]] plan::ModelShape shape_of(const SeamsCase& c);
[[nodiscard]] plan::Layout layout_of(const SeamsCase& c, bool one_rank);

// Ids, targets (some ignored), weights and the map of the whole rows.
struct Batch {
  at::Tensor ids_BT, targets_BT, weights_BT;
  at::Tensor first_key_BT, positions_BT;
};
[[nodiscard]] Batch batch_of(const SeamsCase& c);

// Leaves of autograd with the values of a block's outputs, for the block behind it.
[[nodiscard]] nn::BlockIO detached(const nn::BlockIO& out);
// The block's backward from the gradients that `next`, its detached outputs, has by now.
void backward_block(const nn::BlockIO& out, const nn::BlockIO& next);

// One rank: its part of the model and of the batch.
class SeamsRank {
 public:
  // world: undefined for the one-rank reference. Collective over: world.
  SeamsRank(const SeamsCase& c, const std::optional<comm::Communicator>& world);

  [[nodiscard]] param::Context context(param::Mode mode) const;
  // The tokens of x [B, T, ...] that this rank holds between blocks (`stream`), or within.
  [[nodiscard]] at::Tensor part(const at::Tensor& x_BT, bool stream) const;

  // Named tensors of a training pass: outputs and input gradients of the blocks ("stream ..."),
  // scores ("tokens ..."), the loss ("sum ...").
  using Named = std::vector<std::pair<std::string, at::Tensor>>;
  [[nodiscard]] Named train();
  // Logits of the last `count` positions in evaluation.
  [[nodiscard]] at::Tensor logits(int64_t count);
  [[nodiscard]] LayoutStore& store() { return *store_; }
  [[nodiscard]] nn::Model& model() { return model_; }
  [[nodiscard]] nn::Seams& seams() { return *seams_; }

 private:
  [[nodiscard]] nn::TokenScores score(const nn::BlockIO& in, at::Tensor& objective);

  SeamsCase case_;
  mesh::Mesh mesh_;
  int tp_rank_ = 0, cp_rank_ = 0;
  Batch batch_;
  param::RowMap rows_;
  std::unique_ptr<LayoutStore> store_;
  std::unique_ptr<nn::Seams> seams_;
  nn::Model model_;
};

// Calls fn(rank, index) on every rank of the case.
void run_ranks_of(const SeamsCase& c, const std::function<void(SeamsRank& rank, int index)>& fn);

// max |got - want| / max(max |want|, 1e-3); infinity for NaN or other sizes.
[[nodiscard]] double error_of(const at::Tensor& got, const at::Tensor& want);

// Runs the case on its ranks and compares everything; the worst error, failures by EXPECT.
double expect_equal_to_one_rank(const SeamsCase& c);

}  // namespace capstan::test
