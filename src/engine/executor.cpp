// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "engine/executor_internal.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "capstan/base/check.h"
#include "capstan/base/error.h"
#include "capstan/base/trace.h"
#include "engine/block_backward_internal.h"
#include "engine/block_io_internal.h"

namespace capstan::engine {
namespace {

[[noreturn]] void refuse_curvature() {
  throw ConfigError(ErrorText{.module = "engine",
                              .what = "estimating the curvature",
                              .got = "an objective without token weights",
                              .need = "a weighted sum of token losses",
                              .why = "optimizer.name sophia draws labels for it",
                              .fix = "Set optimizer.name: adamw"});
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

Executor::Executor(const plan::Plan& plan, parallel::ParallelModel& model, mesh::Mesh& mesh,
                   Trace trace)
    : plan_(plan),
      model_(model),
      pipeline_rank_(mesh.coord().pp),
      stages_(plan.schedule.stages),
      tensor_ranks_(plan.grid.sizes().tp),
      instructions_(plan.schedule.ranks.at(static_cast<size_t>(pipeline_rank_))),
      trace_(std::move(trace)) {
  for (const auto& store : model_.stores)
    if (store->layout().trainable) anchors_.push_back(store->anchor());
}

void Executor::note(const char* what, int index) const {
  if (trace_) trace_(what, index);
}

bool Executor::ends_stage(int block) const {
  for (const auto& chunk : model_.chunks)
    if (chunk.blocks.back() == block) return block != model_.model.shape.head_block();
  return false;
}

bool Executor::is_layer(int block) const {
  return block > 0 && block < model_.model.shape.head_block();
}
bool Executor::is_recomputed(int block) const { return model_.recompute_blocks && is_layer(block); }

// The stage after (+1) or before (-1) a chunk's: its pipeline rank, and its chunk there.
std::pair<int, int> Executor::neighbour(int chunk, int direction) const {
  const int stage = model_.chunks.at(static_cast<size_t>(chunk)).stage + direction;
  const int rank = plan_.schedule.rank_of.at(static_cast<size_t>(stage));
  const auto& held = plan_.schedule.stage_of.at(static_cast<size_t>(rank));
  return {rank, static_cast<int>(std::find(held.begin(), held.end(), stage) - held.begin())};
}

param::Context Executor::train_context(int micro_batch, const MicroBatch& batch,
                                       const StepWork& work) const {
  param::Context context{.key = {.seed = static_cast<uint64_t>(plan_.resolved.run.seed)},
                         .mode = param::Mode::kTrain,
                         .micro_batch = micro_batch,
                         .rows = &batch.rows};
  context.rows_of_step = static_cast<double>(plan_.batch.global_samples);
  // Drawn labels are no part of the losses on routers, and a row is counted once.
  context.loss_scale = work.uniform ? 0 : work.loss_scale;
  // What else reads it here is refused on a device that decides it.
  if (work.scale_on_device.defined()) context.loss_scale = std::numeric_limits<double>::quiet_NaN();
  if (!model_.balance) return context;
  if (!work.uniform) context.stats = model_.balance.get();
  context.routers = model_.balance->states();
  return context;
}

// Memory for what travels between stages.
Tensor Executor::boundary_like(const param::Context& context, const Tensor& ids_BT) const {
  const bool cut = plan_.resolved.parallel.sequence && context.mode != param::Mode::kDecode;
  const int64_t tokens = ids_BT.size(1) / (cut ? tensor_ranks_ : 1);
  return at::empty({ids_BT.size(0), tokens, model_.model.shape.hidden_size},
                   ids_BT.options().dtype(parallel::scalar_type_of(plan_.precision.residual)));
}

void Executor::run(const StepWork& work, const std::function<void(const Tensor&)>& finish) {
  loss_ = Tensor();
  next_pass_ = 0;
  in_flight_.clear();  // a step that threw may have left something
  model_.queue->target = nullptr;
  model_.buckets->begin_step();
  for (instruction_ = 0; instruction_ < static_cast<int>(instructions_.size()); ++instruction_) {
    const auto& instruction = instructions_[static_cast<size_t>(instruction_)];
    if (instruction.op != plan::Op::kStep) {
      execute(instruction, work);
      continue;
    }
    for (auto& sent : sends_) sent.wait();
    sends_.clear();
    finish(loss_);
  }
}

void Executor::add_loss(const Tensor& loss) {
  const at::NoGradGuard no_grad;
  loss_ = loss_.defined() ? loss_ + loss : loss;
}

void Executor::execute(const plan::Instruction& i, const StepWork& work) {
  switch (i.op) {
    case plan::Op::kForward:
      return forward(i.chunk, i.micro_batch, work);
    case plan::Op::kBackward:
      backward(i.chunk, i.micro_batch, work, false);
      break;
    case plan::Op::kBackwardInput:
      backward(i.chunk, i.micro_batch, work, true);
      break;
    case plan::Op::kBackwardWeight:
      return backward_weights(i.chunk, i.micro_batch);
    case plan::Op::kReceiveActivation:
    case plan::Op::kReceiveGradient:
      return receive(i, work);
    case plan::Op::kSendActivation:
    case plan::Op::kSendGradient:
      return send(i);
    case plan::Op::kReduce:  // sums are issued pass by pass, the last one already
    case plan::Op::kStep:
      break;
  }
}

void Executor::receive(const plan::Instruction& i, const StepWork& work) {
  const MicroBatch& batch = work.batches->at(static_cast<size_t>(i.micro_batch));
  const Tensor arriving = boundary_like(train_context(i.micro_batch, batch, work), batch.ids_BT);
  const bool is_gradient = i.op == plan::Op::kReceiveGradient;
  InFlight& flight = in_flight_[{i.chunk, i.micro_batch}];
  if (is_gradient) fetch(flight, flight.blocks.size() - 1);
  const auto& channel = is_gradient ? model_.links.gradients : model_.links.activations;
  channel.recv(arriving, i.peer).wait();
  (is_gradient ? flight.output_gradient : flight.input) = arriving;
}

// Never waits; a buffer is kept until it has been received.
void Executor::send(const plan::Instruction& i) {
  sends_.remove_if([](const comm::Work& sent) { return sent.is_done(); });
  InFlight& flight = in_flight_.at({i.chunk, i.micro_batch});
  if (i.op == plan::Op::kSendActivation) {
    const Tensor made = std::exchange(flight.output, Tensor());
    sends_.push_back(model_.links.activations.send(made.contiguous(), i.peer));
    return;
  }
  sends_.push_back(model_.links.gradients.send(flight.input_gradient.contiguous(), i.peer));
  flight.input_gradient = Tensor();
}

// A neighbouring stage on this rank gets the value without a transfer.
void Executor::hand_over(int chunk, int micro_batch, bool is_gradient, const Tensor& value) {
  const auto [rank, other] = neighbour(chunk, is_gradient ? -1 : 1);
  if (rank != pipeline_rank_) return;
  InFlight& flight = in_flight_[{other, micro_batch}];
  (is_gradient ? flight.output_gradient : flight.input) = value;
}

nn::BlockIO Executor::run_block(int block, const param::Context& context, const nn::BlockIO& in,
                                const Tensor& ids_BT) {
  const trace::Span span("compute", "forward");
  nn::BlockIO out;
  if (block == 0)
    out = model_.model.embedding->forward(context, *model_.seams, ids_BT);
  else
    out =
        model_.model.layers.at(static_cast<size_t>(block - 1))->forward(context, *model_.seams, in);
  return ends_stage(block) ? merged(out) : out;
}

// Starts the gathers of the blocks that run next, as many as the recipe says.
void Executor::prefetch(const parallel::Chunk& chunk, size_t position, int direction) {
  for (int64_t ahead = 1; ahead <= plan_.resolved.parallel.zero.prefetch; ++ahead) {
    const int64_t next = static_cast<int64_t>(position) + direction * ahead;
    if (next < 0 || next >= static_cast<int64_t>(chunk.blocks.size())) return;
    const int block = chunk.blocks[static_cast<size_t>(next)];
    if (direction < 0 && block == 0) return;  // the embedding's backward reads no weights
    for (const int s : model_.stores_of_block.at(static_cast<size_t>(block))) {
      parallel::FlatStore& store = *model_.stores[static_cast<size_t>(s)];
      if (store.is_whole()) continue;
      note("gather", block);
      store.prefetch();
    }
  }
}

// Starts the way back of what a block left on the host.
void Executor::fetch(const InFlight& flight, size_t position) {
  if (const auto& offload = model_.activation_offload)
    offload->fetch(flight.blocks.at(position).offloaded.get());
}

// Whether the instruction after this forward is its backward.
bool Executor::turns_around() const {
  const plan::Instruction& here = instructions_.at(static_cast<size_t>(instruction_));
  const plan::Instruction& next = instructions_.at(static_cast<size_t>(instruction_) + 1);
  const bool is_backward = next.op == plan::Op::kBackward || next.op == plan::Op::kBackwardInput;
  return is_backward && next.chunk == here.chunk && next.micro_batch == here.micro_batch;
}

void Executor::forward(int chunk_index, int micro_batch, const StepWork& work) {
  const auto& chunk = model_.chunks.at(static_cast<size_t>(chunk_index));
  const MicroBatch& batch = work.batches->at(static_cast<size_t>(micro_batch));
  const param::Context context = train_context(micro_batch, batch, work);
  InFlight& flight = in_flight_[{chunk_index, micro_batch}];
  flight.blocks.resize(chunk.blocks.size());
  nn::BlockIO made{
      .hidden_BTD = {}, .residual_BTD = std::exchange(flight.input, Tensor()), .extras = {}};
  for (size_t i = 0; i < chunk.blocks.size(); ++i) {
    const int block = chunk.blocks[i];
    // What comes from another stage is differentiated whatever this rank knows of it.
    const nn::BlockIO in = cut_off(made, i == 0 || is_recomputed(chunk.blocks[i - 1]));
    made = {};
    const OpenBlock open(model_, block);
    prefetch(chunk, i, +1);
    if (block == model_.model.shape.head_block() && i > 0 && turns_around()) fetch(flight, i - 1);
    note("forward", block);
    made = forward_block(block, context, in, flight, flight.blocks[i], work, batch);
  }
  if (chunk.stage + 1 == stages_) return;
  flight.output = made.residual_BTD.detach();
  if (neighbour(chunk_index, +1).first == pipeline_rank_)
    hand_over(chunk_index, micro_batch, false, std::exchange(flight.output, Tensor()));
}

nn::BlockIO Executor::forward_block(int block, const param::Context& context, const nn::BlockIO& in,
                                    InFlight& flight, BlockRun& run, const StepWork& work,
                                    const MicroBatch& batch) {
  parallel::ActivationOffload* const offload = model_.activation_offload.get();
  if (is_recomputed(block)) {
    const at::NoGradGuard no_graph;
    nn::BlockIO made = run_block(block, context, in, batch.ids_BT);
    run.in = in;
    if (offload) run.on_host = put_away(run.in, *offload);
    if (offload) run.offloaded = offload->end_block();
    return made;
  }
  GraphInput input = start_graph(in);
  run.leaves = std::move(input.edges);
  if (block == model_.model.shape.head_block()) {
    score(context, input.io, flight, work, batch);
    return {};
  }
  const ops::KeeperGuard keeper(is_layer(block) ? offload : nullptr);
  nn::BlockIO made = run_block(block, context, input.io, batch.ids_BT);
  run.roots = roots_of(made);
  if (offload) run.offloaded = offload->end_block();
  return made;
}

Tensor Executor::scaled_weights(const StepWork& work, const MicroBatch& batch) const {
  const Tensor weights_BT = work.objective->weights(batch, work.denominator);
  if (!weights_BT.defined()) return {};
  const auto type = plan_.precision.compute == DType::kFp64 ? at::kDouble : at::kFloat;
  return (work.scale_on_device.defined() ? weights_BT.mul(work.scale_on_device)
                                         : weights_BT.mul(work.loss_scale))
      .to(type);
}

void Executor::score(const param::Context& context, const nn::BlockIO& in, InFlight& flight,
                     const StepWork& work, const MicroBatch& batch) {
  const trace::Span span("compute", "score");
  nn::ScoreRequest request;
  request.weights_BT = work.weights ? work.weights->at(static_cast<size_t>(context.micro_batch))
                                    : scaled_weights(work, batch);
  if (work.uniform) {
    if (!request.weights_BT.defined()) refuse_curvature();
    request.uniform_BT = work.uniform->at(static_cast<size_t>(context.micro_batch));
  }
  const auto scores =
      model_.model.head->score(context, *model_.seams, in, batch.targets_BT, request);
  if (request.weights_BT.defined()) {
    flight.loss = scores.weighted_loss;
    const Tensor loss = flight.loss.detach().to(at::kDouble);
    add_loss(work.scale_on_device.defined() ? loss / work.scale_on_device : loss / work.loss_scale);
    return;
  }
  flight.loss = work.objective->loss(scores, batch, work.denominator);
  flight.seed = work.scale_on_device.defined() ? work.scale_on_device.to(flight.loss.scalar_type())
                                               : at::full_like(flight.loss, work.loss_scale);
  add_loss(flight.loss.detach().to(at::kDouble));
}

// Gradients of the block's inputs, by place. Consumes the run: its graph lives on in the roots
// only.
std::vector<Tensor> Executor::backward_block(int block, BlockRun run, InFlight& flight,
                                             std::vector<Tensor> gradients,
                                             const param::Context& context,
                                             const MicroBatch& batch) {
  const trace::Span span("compute", "backward");
  std::optional<OpenBlock> open;
  if (block > 0) open.emplace(model_, block);
  if (is_recomputed(block)) {
    bring_back(run.in, std::move(run.on_host));
    param::Context again = context;
    again.mode = param::Mode::kRecompute;
    again.stats = nullptr;
    const at::AutoGradMode with_graph(true);
    GraphInput input = start_graph(std::exchange(run.in, {}));
    run.leaves = std::move(input.edges);
    run.roots = roots_of(run_block(block, again, input.io, batch.ids_BT));
  }
  Roots roots;
  if (flight.loss.defined()) {
    Tensor seed = std::exchange(flight.seed, Tensor());
    if (!seed.defined()) seed = at::ones_like(flight.loss);
    roots.add(root_of(flight.loss), std::move(seed));
    flight.loss = Tensor();
  }
  for (size_t t = 0; t < gradients.size(); ++t)
    roots.add(std::move(run.roots[t]), std::move(gradients[t]));
  run.roots.clear();
  return differentiate(std::move(roots), run.leaves, anchors_);
}

void Executor::backward(int chunk_index, int micro_batch, const StepWork& work,
                        bool defer_weights) {
  const auto& chunk = model_.chunks.at(static_cast<size_t>(chunk_index));
  const MicroBatch& batch = work.batches->at(static_cast<size_t>(micro_batch));
  const param::Context context = train_context(micro_batch, batch, work);
  InFlight& flight = in_flight_.at({chunk_index, micro_batch});
  model_.queue->target = defer_weights ? &flight.weight_work : nullptr;
  std::vector<Tensor> gradients;
  if (chunk.stage + 1 < stages_) gradients = {Tensor(), std::move(flight.output_gradient)};
  for (size_t i = chunk.blocks.size(); i-- > 0;) {
    const int block = chunk.blocks[i];
    fetch(flight, i);
    if (i > 0) fetch(flight, i - 1);
    note("backward", block);
    BlockRun run = std::move(flight.blocks[i]);
    flight.blocks.pop_back();
    gradients = backward_block(block, std::move(run), flight, std::move(gradients), context, batch);
    prefetch(chunk, i, -1);
    if (!defer_weights) pass_done(block);
  }
  model_.queue->target = nullptr;
  if (chunk.stage > 0) {
    flight.input_gradient = gradients.at(1);
    if (!flight.input_gradient.defined())
      flight.input_gradient = boundary_like(context, batch.ids_BT).zero_();
    if (neighbour(chunk_index, -1).first == pipeline_rank_)
      hand_over(chunk_index, micro_batch, true, std::exchange(flight.input_gradient, Tensor()));
  }
}

void Executor::backward_weights(int chunk_index, int micro_batch) {
  InFlight& flight = in_flight_.at({chunk_index, micro_batch});
  const trace::Span span("compute", "backward weights");
  for (; !flight.weight_work.empty(); flight.weight_work.pop_front()) flight.weight_work.front()();
  const auto& blocks = model_.chunks.at(static_cast<size_t>(chunk_index)).blocks;
  for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) pass_done(*block);
}

// The plan says which sums are complete after which pass.
void Executor::pass_done(int block) {
  CAPSTAN_CHECK(next_pass_ < model_.passes.size(), "more passes than planned, block {}", block);
  const plan::GradientPass& pass = model_.passes[next_pass_++];
  CAPSTAN_CHECK(pass.block == block && pass.instruction == instruction_,
                "pass through block {} by instruction {}, planned is block {} by {}", block,
                instruction_, pass.block, pass.instruction);
  for (size_t i = 0; i < pass.complete.size(); ++i)
    model_.buckets->complete(pass.complete[i], pass.is_last[i]);
}

Tensor Executor::forward_only(const param::Context& context, const Tensor& ids_BT,
                              const HeadCall& head) {
  const at::NoGradGuard no_graph;
  Tensor result;
  std::map<int, Tensor> arrived;  // by chunk
  std::vector<comm::Work> sends;
  for (int stage = 0; stage < stages_; ++stage) {
    if (plan_.schedule.rank_of[static_cast<size_t>(stage)] != pipeline_rank_) continue;
    const auto at = std::find_if(model_.chunks.begin(), model_.chunks.end(),
                                 [&](const auto& chunk) { return chunk.stage == stage; });
    const int index = static_cast<int>(at - model_.chunks.begin());
    if (stage > 0 && !arrived[index].defined()) {
      arrived[index] = boundary_like(context, ids_BT);
      model_.links.activations.recv(arrived[index], neighbour(index, -1).first).wait();
    }
    nn::BlockIO io{.hidden_BTD = {}, .residual_BTD = arrived[index], .extras = {}};
    for (size_t i = 0; i < at->blocks.size(); ++i) {
      const OpenBlock open(model_, at->blocks[i]);
      prefetch(*at, i, +1);
      if (at->blocks[i] == model_.model.shape.head_block())
        result = head(io);
      else
        io = run_block(at->blocks[i], context, io, ids_BT);
    }
    if (stage + 1 == stages_) continue;
    const auto [next_rank, next_chunk] = neighbour(index, +1);
    if (next_rank == pipeline_rank_)
      arrived[next_chunk] = io.residual_BTD;
    else
      sends.push_back(model_.links.activations.send(io.residual_BTD.contiguous(), next_rank));
  }
  for (auto& sent : sends) sent.wait();
  return result;
}

Tensor Executor::eval_logprob(const param::Context& context, const MicroBatch& batch) {
  return forward_only(context, batch.ids_BT, [&](const nn::BlockIO& io) {
    return model_.model.head->score(context, *model_.seams, io, batch.targets_BT, {}).logprob_BT;
  });
}

Tensor Executor::logits(const param::Context& context, const Tensor& ids_BT, int64_t count) {
  return forward_only(context, ids_BT, [&](const nn::BlockIO& io) {
    return model_.model.head->logits(context, *model_.seams, io, count);
  });
}

}  // namespace capstan::engine
