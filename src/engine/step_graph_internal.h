// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The device's work of a step as graphs: run as it is for a few steps, recorded once, launched from
// then on. What differs from step to step lies in tensors that stay where they are.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "capstan/device/accelerator.h"
#include "capstan/engine/engine.h"

namespace capstan::engine {

// Work that is recorded when the device has done it often enough for libraries to have chosen
// their kernels and taken their memory.
class RecordedWork {
 public:
  explicit RecordedWork(device::Accelerator& accelerator) : accelerator_(accelerator) {}
  ~RecordedWork();
  RecordedWork(const RecordedWork&) = delete;
  RecordedWork& operator=(const RecordedWork&) = delete;
  // Every call is of the same work: the same ops on the same memory, until it is forgotten.
  void run(const std::function<void()>& work);
  // The work is another one from here on: it is run as it is once, and recorded anew. The host
  // waits.
  void forget();

 private:
  void record(const std::function<void()>& work);

  device::Accelerator& accelerator_;
  device::Graph graph_;
  int calls_ = 0;
};

class StepGraph {
 public:
  explicit StepGraph(device::Accelerator& accelerator) : passes(accelerator), update(accelerator) {}

  // The values of a step's micro-batches, and the weights of their tokens as the head reads them,
  // in tensors that stay where they are. With more documents than ever the graphs are forgotten.
  void load(const std::vector<MicroBatch>& batches, const std::vector<Tensor>& weights);
  [[nodiscard]] const std::vector<MicroBatch>& batches() const { return batches_; }
  [[nodiscard]] const std::vector<Tensor>& weights() const { return weights_; }

  RecordedWork passes;  // forward and backward of all micro-batches
  RecordedWork update;  // sums, decision, optimizer
  Tensor loss;          // what the passes leave for the update

 private:
  void make_room(const std::vector<MicroBatch>& batches);

  int64_t places_ = 0;  // of starts of documents, in each micro-batch
  std::vector<MicroBatch> batches_;
  std::vector<Tensor> weights_;
};

}  // namespace capstan::engine
