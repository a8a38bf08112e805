// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// parallelize(): one rank's part of a model. Applies, in this order: stage split, tensor and
// sequence, context, experts, recompute, flat storage and ZeRO.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "capstan/mesh/mesh.h"
#include "capstan/nn/model.h"
#include "capstan/ops/fp8_linear.h"
#include "capstan/parallel/activation_offload.h"
#include "capstan/parallel/expert_balance.h"
#include "capstan/parallel/flat_store.h"
#include "capstan/parallel/gradient_buckets.h"
#include "capstan/parallel/host_link.h"
#include "capstan/plan/passes.h"
#include "capstan/plan/plan.h"

namespace capstan::parallel {

// Consecutive blocks that run as one instruction.
struct Chunk {
  int stage = 0;
  std::vector<int> blocks;  // ascending
};

// The neighbouring stages; channels are apart so that activations and gradients never wait for each
// other.
struct PipelineLinks {
  comm::Communicator activations, gradients;  // along pp
};

// Move-only; the plan it was made from must outlive it.
struct ParallelModel {
  std::string name;  // in Plan::models
  std::vector<Chunk> chunks;
  PipelineLinks links;
  std::shared_ptr<ops::Fp8Linear> fp8;  // of its linear layers, where the recipe wants it
  std::unique_ptr<nn::Seams> seams;
  std::unique_ptr<HostLink> link;  // to a device of which something is offloaded
  bool recompute_blocks = false;   // a layer keeps its input and runs again in the backward
  std::unique_ptr<ActivationOffload> activation_offload;  // where the recipe wants it
  std::unique_ptr<WeightQueue> queue;
  std::unique_ptr<ExpertBalance> balance;          // models with experts
  std::vector<std::unique_ptr<FlatStore>> stores;  // in block order
  std::vector<std::vector<int>> stores_of_block;   // whose values a block reads (tied head: two)
  std::vector<plan::GradientPass> passes;          // store i holds RankLayout::buffers[i]
  std::unique_ptr<GradientBuckets> buckets;
  nn::Model model;

  // Empty when another stage holds it.
  [[nodiscard]] param::Param find(const std::string& name) const;
};

// Weights are zero until FlatStore::initialize or a load. Collective over: world.
[[nodiscard]] ParallelModel parallelize(const plan::Plan& plan, const std::string& model,
                                        mesh::Mesh& mesh, BucketHooks hooks = {});

}  // namespace capstan::parallel
