// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A small mixture of experts run block by block on every rank of a data x context x tensor grid
// with experts folded over it, and compared with the same model on one rank: choices, outputs,
// input gradients, every weight's gradient, statistics, and what the next step starts from.
#pragma once
#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "capstan/mesh/mesh.h"
#include "capstan/nn/model.h"
#include "capstan/parallel/expert_balance.h"
#include "ranks/parallel/layout_store.h"

namespace capstan::test {

struct ExpertCase {
  int replicate = 1, shard = 1, cp = 1, tp = 1;
  bool sequence = false;
  int ep = 1;
  plan::ExpertShape experts = {};
  int64_t samples = 8, tokens = 16, micro_batches = 1;
  std::vector<int> frozen_blocks = {};
  double tolerance = 1e-11;

  [[nodiscard]] int ranks() const { return replicate * shard * cp * tp; }
  [[nodiscard]] plan::Grid::Sizes sizes() const {
    return {.dp_replicate = replicate, .dp_shard = shard, .cp = cp, .tp = tp, .ep = ep};
  }
  [[nodiscard]] std::string text() const;
};
[[nodiscard]] plan::ModelShape shape_of(const ExpertCase& c);

// One rank: its part of the model and of the batch.
class ExpertRank {
 public:
  // world: undefined for the one-rank reference. Collective over: world.
  ExpertRank(const ExpertCase& c, const std::optional<comm::Communicator>& world);
  ~ExpertRank();

  struct Pass {
    // By layer: token number (sample x tokens + place) and the experts chosen for it.
    std::vector<std::pair<at::Tensor, at::Tensor>> choices;
    // Outputs of blocks and gradients of their inputs, of all local samples.
    std::vector<std::pair<std::string, at::Tensor>> stream;
    double loss = 0;    // of local samples
    double margin = 0;  // smallest of all choices
    std::vector<parallel::ExpertLoad> loads;
  };
  // A step of all micro-batches, statistics summed. Collective over: world.
  [[nodiscard]] Pass train();
  // The samples of this rank's data index decoded one token at a time: logits [B, T, V].
  [[nodiscard]] at::Tensor decode();

  // Of x [samples, tokens, ...], what this rank holds between blocks.
  [[nodiscard]] at::Tensor stream_part(const at::Tensor& x) const;
  [[nodiscard]] at::Tensor sample_part(const at::Tensor& x) const;
  [[nodiscard]] LayoutStore& store() { return *store_; }
  [[nodiscard]] mesh::Mesh& mesh() { return mesh_; }
  [[nodiscard]] const parallel::ExpertBalance& balance() const { return *balance_; }

 private:
  struct Sink;
  void train_micro_batch(int64_t index, Pass& pass, Sink& sink);
  [[nodiscard]] at::Tensor context_part(const at::Tensor& x) const;
  [[nodiscard]] at::Tensor routed_part(const at::Tensor& x) const;
  [[nodiscard]] int64_t data_ranks() const {
    return int64_t{1} * mesh_.grid().data_parallel_size();
  }

  ExpertCase case_;
  mesh::Mesh mesh_;
  std::unique_ptr<nn::Seams> seams_;
  std::unique_ptr<LayoutStore> store_;
  std::unique_ptr<parallel::ExpertBalance> balance_;
  nn::Model model_;
  param::RowMap rows_;
};

// Runs the case on threads and on one rank; returns the largest relative error.
double expect_equal_to_one_rank(const ExpertCase& c);

}  // namespace capstan::test
