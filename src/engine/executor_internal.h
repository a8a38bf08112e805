// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Executor: runs the plan's instruction list of one rank. Every block is an autograd graph of its
// own: forward detaches between blocks, backward goes block by block and drops a block's graph as
// soon as it is through.
#pragma once
#include <functional>
#include <map>
#include <vector>

#include "capstan/engine/engine.h"
#include "capstan/parallel/parallelize.h"

namespace capstan::engine {

// What the passes of one optimizer step have in common.
struct StepWork {
  const std::vector<MicroBatch>* batches = nullptr;
  const Objective* objective = nullptr;
  double denominator = 1;  // over all ranks
  double loss_scale = 1;
};

class Executor {
 public:
  using Trace = std::function<void(const char*, int)>;
  // Both must outlive the executor.
  Executor(const plan::Plan& plan, parallel::ParallelModel& model, int pipeline_rank, Trace trace);

  // Forward and backward of all micro-batches; gradients are being summed when it returns. Returns
  // this rank's part of the step's loss, without loss scale. Calls finish at the plan's step
  // instruction.
  double run(const StepWork& work, const std::function<void(double loss)>& finish);

  // Without graph. The input of the head for one micro-batch.
  [[nodiscard]] nn::BlockIO forward_to_head(const param::Context& context, const Tensor& ids_BT);
  [[nodiscard]] Tensor eval_logprob(const param::Context& context, const MicroBatch& batch);
  [[nodiscard]] Tensor logits(const param::Context& context, const Tensor& ids_BT, int64_t count);

 private:
  struct BlockRun {
    nn::BlockIO in;   // leaves of the block's graph
    nn::BlockIO out;  // of every block but the head
  };
  struct InFlight {
    std::vector<BlockRun> blocks;  // as in the chunk
    Tensor loss;                   // scaled, 0-d
    double seed = 1;               // gradient of the loss
  };
  class OpenBlock;

  void execute(const plan::Instruction& instruction, const StepWork& work);
  void forward(const parallel::Chunk& chunk, InFlight& flight, const StepWork& work,
               int micro_batch);
  void score(const param::Context& context, InFlight& flight, const StepWork& work,
             const MicroBatch& batch);
  void backward(const parallel::Chunk& chunk, InFlight& flight);
  [[nodiscard]] nn::BlockIO run_block(int block, const param::Context& context,
                                      const nn::BlockIO& in, const Tensor& ids_BT);
  [[nodiscard]] std::vector<int> count_passes() const;
  void note(const char* what, int index) const;

  const plan::Plan& plan_;
  parallel::ParallelModel& model_;
  const std::vector<plan::Instruction>& instructions_;
  Trace trace_;
  std::vector<int> passes_;      // backward passes through each store in a step
  std::vector<Tensor> anchors_;  // of trainable stores: autograd must visit their ops
  std::map<std::pair<int, int>, InFlight> in_flight_;  // chunk, micro-batch
  double loss_ = 0;
};

}  // namespace capstan::engine
