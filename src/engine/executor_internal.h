// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Executor: runs the plan's instruction list of one rank. Every block is an autograd graph of its
// own: forward detaches between blocks, backward goes block by block and drops a block's graph as
// soon as it is through. Between stages one tensor travels: the residual stream with the last
// block's output added.
#pragma once
#include <functional>
#include <list>
#include <map>
#include <vector>

#include "capstan/engine/engine.h"
#include "capstan/parallel/parallelize.h"
#include "engine/block_io_internal.h"

namespace capstan::engine {

// What the passes of one optimizer step have in common.
struct StepWork {
  const std::vector<MicroBatch>* batches = nullptr;  // this rank's part of the rows
  const Objective* objective = nullptr;
  double denominator = 1;  // over all ranks
  double loss_scale = 1;
  // fp64, 0-d, on the device, where the scale is decided there: in place of loss_scale.
  Tensor scale_on_device = {};
  // Of each micro-batch, as scaled_weights() makes them; null: the objective is asked.
  const std::vector<Tensor>* weights = nullptr;
  // Where labels are drawn instead of the targets, of each micro-batch [B, T]; null: targets.
  const std::vector<Tensor>* uniform = nullptr;
};

class Executor {
 public:
  using Trace = std::function<void(const char*, int)>;
  // All must outlive the executor.
  Executor(const plan::Plan& plan, parallel::ParallelModel& model, mesh::Mesh& mesh, Trace trace);

  // Forward and backward of all micro-batches. At the plan's step instruction, when all gradient
  // sums are issued, finish is called with this rank's part of the step's loss, without loss scale:
  // fp64, 0-d, undefined on ranks without the last stage.
  void run(const StepWork& work, const std::function<void(const Tensor& loss)>& finish);

  // Weights of the tokens as the head reads them [B, T]; undefined where the objective has none.
  [[nodiscard]] Tensor scaled_weights(const StepWork& work, const MicroBatch& batch) const;

  // Without graph, through all stages. Results are undefined on ranks without the last stage.
  // Collective over: pp (and the axes of the seams).
  [[nodiscard]] Tensor eval_logprob(const param::Context& context, const MicroBatch& batch);
  [[nodiscard]] Tensor logits(const param::Context& context, const Tensor& ids_BT, int64_t count);
  [[nodiscard]] int last_pipeline_rank() const { return plan_.schedule.rank_of.back(); }

 private:
  void add_loss(const Tensor& loss);
  struct BlockRun {
    std::vector<Edge> leaves, roots;  // of its graph, by place in a BlockIO
    nn::BlockIO in;                   // of a block that is run again, which has no graph yet
    InputOnHost on_host;              // in place of `in`, where activations are offloaded
    std::shared_ptr<parallel::OffloadedBlock> offloaded;  // null: nothing has to come back
  };
  struct InFlight {
    Tensor input;                  // of the first block; undefined on the first stage
    std::vector<BlockRun> blocks;  // as in the chunk
    Tensor output;                 // on its way to the next stage
    Tensor loss;                   // scaled, 0-d
    Tensor seed;                   // gradient of the loss; undefined: 1
    Tensor output_gradient, input_gradient;
    parallel::WeightQueue::Work weight_work;  // put off by a split backward
  };
  class OpenBlock;
  using HeadCall = std::function<Tensor(const nn::BlockIO& in)>;

  void execute(const plan::Instruction& instruction, const StepWork& work);
  void receive(const plan::Instruction& instruction, const StepWork& work);
  void send(const plan::Instruction& instruction);
  void forward(int chunk, int micro_batch, const StepWork& work);
  [[nodiscard]] nn::BlockIO forward_block(int block, const param::Context& context,
                                          const nn::BlockIO& in, InFlight& flight, BlockRun& run,
                                          const StepWork& work, const MicroBatch& batch);
  void score(const param::Context& context, const nn::BlockIO& in, InFlight& flight,
             const StepWork& work, const MicroBatch& batch);
  void backward(int chunk, int micro_batch, const StepWork& work, bool defer_weights);
  void backward_weights(int chunk, int micro_batch);
  [[nodiscard]] std::vector<Tensor> backward_block(int block, BlockRun run, InFlight& flight,
                                                   std::vector<Tensor> gradients,
                                                   const param::Context& context,
                                                   const MicroBatch& batch);
  void hand_over(int chunk, int micro_batch, bool is_gradient, const Tensor& value);
  void pass_done(int block);
  void prefetch(const parallel::Chunk& chunk, size_t position, int direction);
  void fetch(const InFlight& flight, size_t position);
  [[nodiscard]] bool turns_around() const;
  [[nodiscard]] nn::BlockIO run_block(int block, const param::Context& context,
                                      const nn::BlockIO& in, const Tensor& ids_BT);
  [[nodiscard]] Tensor forward_only(const param::Context& context, const Tensor& ids_BT,
                                    const HeadCall& head);
  [[nodiscard]] Tensor boundary_like(const param::Context& context, const Tensor& ids_BT) const;
  [[nodiscard]] param::Context train_context(int micro_batch, const MicroBatch& batch,
                                             const StepWork& work) const;
  [[nodiscard]] bool ends_stage(int block) const;
  [[nodiscard]] bool is_layer(int block) const;
  [[nodiscard]] bool is_recomputed(int block) const;
  [[nodiscard]] std::pair<int, int> neighbour(int chunk, int direction) const;  // rank, chunk
  void note(const char* what, int index) const;

  const plan::Plan& plan_;
  parallel::ParallelModel& model_;
  int pipeline_rank_, stages_, tensor_ranks_;
  const std::vector<plan::Instruction>& instructions_;
  Trace trace_;
  std::vector<Tensor> anchors_;  // of trainable stores: autograd must visit their ops
  std::map<std::pair<int, int>, InFlight> in_flight_;  // chunk, micro-batch
  std::list<comm::Work> sends_;
  int instruction_ = 0;  // being executed
  size_t next_pass_ = 0;
  Tensor loss_;  // fp64, of the micro-batches so far
};

}  // namespace capstan::engine
