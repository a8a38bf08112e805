// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "engine/executor_internal.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <utility>

#include "capstan/base/check.h"
#include "capstan/base/trace.h"
#include "engine/block_backward_internal.h"

namespace capstan::engine {
namespace {

// The tensors of a BlockIO in a fixed order; undefined ones included.
std::vector<Tensor> tensors_of(const nn::BlockIO& io) {
  std::vector<Tensor> tensors{io.hidden_BTD, io.residual_BTD};
  for (const auto& [name, tensor] : io.extras) tensors.push_back(tensor);
  return tensors;
}

// The input of the next graph: the same numbers, cut off from the graph that made them.
Tensor as_leaf(const Tensor& made) {
  if (!made.defined()) return made;
  return made.detach().set_requires_grad(made.requires_grad());
}

nn::BlockIO as_leaves(const nn::BlockIO& made) {
  nn::BlockIO leaves{as_leaf(made.hidden_BTD), as_leaf(made.residual_BTD), {}};
  for (const auto& [name, tensor] : made.extras) leaves.extras[name] = as_leaf(tensor);
  return leaves;
}

}  // namespace

// Holds the values of a block's parameters readable.
class Executor::OpenBlock {
 public:
  OpenBlock(parallel::ParallelModel& model, int block)
      : model_(model), stores_(model.stores_of_block.at(static_cast<size_t>(block))) {
    for (const int s : stores_) model_.stores[static_cast<size_t>(s)]->open();
  }
  ~OpenBlock() {
    for (const int s : stores_) model_.stores[static_cast<size_t>(s)]->close();
  }
  OpenBlock(const OpenBlock&) = delete;
  OpenBlock& operator=(const OpenBlock&) = delete;

 private:
  parallel::ParallelModel& model_;
  const std::vector<int>& stores_;
};

Executor::Executor(const plan::Plan& plan, parallel::ParallelModel& model, int pipeline_rank,
                   Trace trace)
    : plan_(plan),
      model_(model),
      instructions_(plan.schedule.ranks.at(static_cast<size_t>(pipeline_rank))),
      trace_(std::move(trace)),
      passes_(count_passes()) {
  for (const auto& store : model_.stores)
    if (store->trainable(0)) anchors_.push_back(store->anchor());
}

std::vector<int> Executor::count_passes() const {
  std::vector<int> passes(model_.stores.size(), 0);
  for (const auto& instruction : instructions_) {
    if (instruction.op != plan::Op::kBackward) continue;
    for (const int block : model_.chunks.at(static_cast<size_t>(instruction.chunk)).blocks)
      for (const int s : model_.stores_of_block.at(static_cast<size_t>(block)))
        ++passes[static_cast<size_t>(s)];
  }
  return passes;
}

void Executor::note(const char* what, int index) const {
  if (trace_) trace_(what, index);
}

double Executor::run(const StepWork& work, const std::function<void(double)>& finish) {
  loss_ = 0;
  in_flight_.clear();  // a step that threw may have left something
  model_.buckets->begin_step(passes_);
  for (const auto& instruction : instructions_) {
    if (instruction.op == plan::Op::kStep)
      finish(loss_);
    else
      execute(instruction, work);
  }
  return loss_;
}

void Executor::execute(const plan::Instruction& instruction, const StepWork& work) {
  const auto& chunk = model_.chunks.at(static_cast<size_t>(instruction.chunk));
  const auto key = std::pair(instruction.chunk, instruction.micro_batch);
  switch (instruction.op) {
    case plan::Op::kForward:
      forward(chunk, in_flight_[key], work, instruction.micro_batch);
      return;
    case plan::Op::kBackward:
      backward(chunk, in_flight_.at(key));
      in_flight_.erase(key);
      return;
    case plan::Op::kReduce:
      return;  // buckets are issued pass by pass, the last one already
    default:
      break;
  }
  CAPSTAN_CHECK(false, "schedule {} asks for {}", plan_.schedule.name,
                plan::name_of(instruction.op));
}

nn::BlockIO Executor::run_block(int block, const param::Context& context, const nn::BlockIO& in,
                                const Tensor& ids_BT) {
  const trace::Span span("compute", "forward");
  const OpenBlock open(model_, block);
  if (block == 0) return model_.model.embedding->forward(context, *model_.seams, ids_BT);
  const auto& layer = model_.model.layers.at(static_cast<size_t>(block - 1));
  return layer->forward(context, *model_.seams, in);
}

void Executor::forward(const parallel::Chunk& chunk, InFlight& flight, const StepWork& work,
                       int micro_batch) {
  const MicroBatch& batch = work.batches->at(static_cast<size_t>(micro_batch));
  const param::Context context{
      .key = {.seed = static_cast<uint64_t>(plan_.resolved.run.seed)},
      .mode = param::Mode::kTrain,
      .micro_batch = micro_batch,
      .rows = &batch.rows,
  };
  const at::AutoGradMode with_graph(true);
  flight.blocks.resize(chunk.blocks.size());
  for (size_t i = 0; i < chunk.blocks.size(); ++i) {
    const int block = chunk.blocks[i];
    note("forward", block);
    BlockRun& run = flight.blocks[i];
    if (i > 0) run.in = as_leaves(flight.blocks[i - 1].out);
    if (block == model_.model.shape.head_block())
      score(context, flight, work, batch);
    else
      run.out = run_block(block, context, run.in, batch.ids_BT);
  }
}

void Executor::score(const param::Context& context, InFlight& flight, const StepWork& work,
                     const MicroBatch& batch) {
  const trace::Span span("compute", "score");
  const nn::BlockIO& in = flight.blocks.back().in;
  const OpenBlock open(model_, model_.model.shape.head_block());
  nn::ScoreRequest request;
  const Tensor weights_BT = work.objective->weights(batch, work.denominator);
  if (weights_BT.defined()) {
    const auto type = plan_.precision.compute == DType::kFp64 ? at::kDouble : at::kFloat;
    request.weights_BT = weights_BT.mul(work.loss_scale).to(type);
  }
  const auto scores =
      model_.model.head->score(context, *model_.seams, in, batch.targets_BT, request);
  if (weights_BT.defined()) {
    flight.loss = scores.weighted_loss;
    loss_ += flight.loss.item<double>() / work.loss_scale;
    return;
  }
  flight.loss = work.objective->loss(scores, batch, work.denominator);
  flight.seed = work.loss_scale;
  loss_ += flight.loss.item<double>();
}

void Executor::backward(const parallel::Chunk& chunk, InFlight& flight) {
  Roots roots;
  roots.add(flight.loss, at::full_like(flight.loss, flight.seed));
  flight.loss = Tensor();
  for (size_t i = chunk.blocks.size(); i-- > 0;) {
    const int block = chunk.blocks[i];
    note("backward", block);
    // The leaves of this block are aliases of what the block before made.
    std::vector<Tensor> leaves, made;
    if (i > 0) {
      const auto in = tensors_of(flight.blocks[i].in);
      const auto out = tensors_of(flight.blocks[i - 1].out);
      for (size_t t = 0; t < in.size(); ++t) {
        if (!in[t].defined() || !in[t].requires_grad()) continue;
        leaves.push_back(in[t]);
        made.push_back(out[t]);
      }
      flight.blocks[i - 1].out = {};
    }
    flight.blocks[i] = {};  // the graph lives on in the roots only
    std::vector<Tensor> gradients;
    {
      const trace::Span span("compute", "backward");
      const OpenBlock open(model_, block);
      gradients = differentiate(std::move(roots), leaves, anchors_);
    }
    roots = {};
    for (size_t t = 0; t < made.size(); ++t) roots.add(std::move(made[t]), std::move(gradients[t]));
    for (const int s : model_.stores_of_block.at(static_cast<size_t>(block)))
      model_.buckets->pass_done(s);
  }
}

nn::BlockIO Executor::forward_to_head(const param::Context& context, const Tensor& ids_BT) {
  nn::BlockIO io;
  for (int block = 0; block < model_.model.shape.head_block(); ++block)
    io = run_block(block, context, io, ids_BT);
  return io;
}

Tensor Executor::eval_logprob(const param::Context& context, const MicroBatch& batch) {
  const at::NoGradGuard no_graph;
  const nn::BlockIO io = forward_to_head(context, batch.ids_BT);
  const OpenBlock open(model_, model_.model.shape.head_block());
  return model_.model.head->score(context, *model_.seams, io, batch.targets_BT, {}).logprob_BT;
}

Tensor Executor::logits(const param::Context& context, const Tensor& ids_BT, int64_t count) {
  const at::NoGradGuard no_graph;
  const nn::BlockIO io = forward_to_head(context, ids_BT);
  const OpenBlock open(model_, model_.model.shape.head_block());
  return model_.model.head->logits(context, *model_.seams, io, count);
}

}  // namespace capstan::engine
