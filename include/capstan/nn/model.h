// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A model is a list of blocks: embedding, layers, head. Each block is its own autograd graph; the
// engine detaches between blocks and runs backward block by block. Written once for one device
// against Param and Seams.
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "capstan/nn/seams.h"
#include "capstan/plan/recompute.h"
#include "capstan/plan/shape.h"

namespace capstan::nn {

// What flows from block to block. The residual stream is kept apart from the last block output that
// has not been added to it yet, so that the addition is fused with the next norm.
struct BlockIO {
  Tensor hidden_BTD;    // output of the last block in compute dtype, not yet added; undefined after
                        // embedding
  Tensor residual_BTD;  // residual dtype
  std::map<std::string, Tensor> extras;  // named, for families that need more
};

class Block {
 public:
  virtual ~Block() = default;
  [[nodiscard]] virtual BlockIO forward(const Context& context, Seams& seams,
                                        const BlockIO& in) const = 0;
};

// The first block: token ids in.
class Embedding {
 public:
  virtual ~Embedding() = default;
  [[nodiscard]] virtual BlockIO forward(const Context& context, Seams& seams,
                                        const Tensor& ids_BT) const = 0;
};

// The last block: scores out.
class Head {
 public:
  virtual ~Head() = default;
  [[nodiscard]] virtual TokenScores score(const Context& context, Seams& seams, const BlockIO& in,
                                          const Tensor& targets_BT,
                                          const ScoreRequest& request) const = 0;
  // Logits of the last `count` positions of each row, [B, count, V] without padding; no gradient.
  [[nodiscard]] virtual Tensor logits(const Context& context, Seams& seams, const BlockIO& in,
                                      int64_t count) const = 0;
};

struct Model {
  plan::ModelShape shape;
  std::unique_ptr<Embedding> embedding;        // block 0
  std::vector<std::unique_ptr<Block>> layers;  // block i + 1
  std::unique_ptr<Head> head;                  // last block
};

// part(context, x); with `again` its ops keep nothing and run once more in the backward, with
// Mode::kRecompute and without statistics (ops/keep.h). What `part` refers to must live as long as
// the pass.
using LayerPart = std::function<Tensor(const Context& context, const Tensor& x)>;
[[nodiscard]] Tensor run_part(bool again, const Context& context, const Tensor& x, LayerPart part);

using FindParam = std::function<Param(const std::string& name)>;
struct ModelOptions {
  at::ScalarType compute;
  at::ScalarType residual;
  // Of the experts of every layer this rank holds part `expert_rank` of `expert_ranks` equal parts;
  // the others are not looked for.
  int expert_ranks = 1, expert_rank = 0;
  plan::RemadeParts remade;
};
using ModelBuilder =
    std::function<Model(const plan::ModelShape&, const ModelOptions&, const FindParam&)>;

// The builder of a family ("llama"); users register their own beside plan::register_family.
[[nodiscard]] Model build_model(const plan::ModelShape& shape, const ModelOptions& options,
                                const FindParam& find);
void register_builder(const std::string& family, ModelBuilder builder);

}  // namespace capstan::nn
