// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The device's work of a step as graphs: run as it is for a few steps, recorded once, launched from
// then on. What differs from step to step lies in tensors that stay where they are.
#pragma once
#include <functional>
#include <utility>
#include <vector>

#include "capstan/device/accelerator.h"
#include "capstan/engine/engine.h"

namespace capstan::engine {

// Where work runs before it is recorded, and is recorded: a stream and memory of its own, so that
// a recording lies in the memory that the work before it has left.
class Lane {
 public:
  explicit Lane(device::Accelerator& accelerator);
  ~Lane();
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;
  [[nodiscard]] device::Accelerator& accelerator() const { return accelerator_; }
  // Behind the current stream, which comes behind it in turn.
  void run(const std::function<void()>& work) const;
  [[nodiscard]] device::Graph record(const std::function<void()>& work) const;

 private:
  template <class Work>
  void in_turn(const Work& work) const;

  device::Accelerator& accelerator_;
  const device::Stream stream_;
  const device::Event event_;
  const device::Pool pool_;
};

// Work that is recorded when the device has done it often enough for libraries to have chosen
// their kernels and taken their memory, and communicators have been made.
class RecordedWork {
 public:
  // `world` has all ranks that the work communicates with. The first calls are run as they are.
  RecordedWork(const Lane& lane, comm::Communicator world, int first_calls = 2)
      : lane_(lane), world_(std::move(world)), first_calls_(first_calls) {}
  ~RecordedWork();
  RecordedWork(const RecordedWork&) = delete;
  RecordedWork& operator=(const RecordedWork&) = delete;
  // Every call is of the same work: the same ops on the same memory, until it is forgotten.
  // Collective over: world.
  void run(const std::function<void()>& work);
  // The work is another one from here on: it is run as it is once, and recorded anew. The host
  // waits.
  void forget();
  [[nodiscard]] bool is_run_next() const { return calls_ < first_calls_; }
  [[nodiscard]] bool is_recorded() const { return graph_.handle != nullptr; }

 private:
  void record(const std::function<void()>& work);

  const Lane& lane_;
  const comm::Communicator world_;
  const int first_calls_;
  device::Graph graph_;
  comm::Ledger::Table traffic_;  // of a launch
  int calls_ = 0;
};

class StepGraph {
  Lane lane_;

 public:
  StepGraph(device::Accelerator& accelerator, const comm::Communicator& world)
      : lane_(accelerator),
        curvature(lane_, world, 1),
        passes(lane_, world),
        update(lane_, world) {}

  // Whether there are more documents than ever.
  [[nodiscard]] bool needs_room(const std::vector<MicroBatch>& batches) const;
  // All ranks, when one of them needs it: they record together.
  void make_room(const std::vector<MicroBatch>& batches);
  [[nodiscard]] bool is_recorded() const { return curvature.is_recorded() || passes.is_recorded(); }
  // Steps are others from here on and are recorded again, on all ranks.
  void forget();
  // The values of a step's micro-batches, and the weights of their tokens as the head reads them,
  // in tensors that stay where they are.
  void load(const std::vector<MicroBatch>& batches, const std::vector<Tensor>& weights);
  [[nodiscard]] const std::vector<MicroBatch>& batches() const { return batches_; }
  [[nodiscard]] const std::vector<Tensor>& weights() const { return weights_; }
  // Likewise what labels are drawn by, before `curvature` is run. What is run as it is takes the
  // memory that recordings lie in: where one of the works is, all are recorded again.
  void load_curvature(const std::vector<Tensor>& uniform);
  [[nodiscard]] const std::vector<Tensor>& uniform() const { return uniform_; }

  // In this order, in every step; the first in some. Its ops are those of the passes, which have
  // chosen kernels by then.
  RecordedWork curvature;  // the optimizer's own pass and what it is for
  RecordedWork passes;     // forward and backward of all micro-batches
  RecordedWork update;     // sums, decision, optimizer
  Tensor loss;             // what the passes leave for the update

 private:
  int64_t places_ = 0;  // of starts of documents, in each micro-batch
  std::vector<MicroBatch> batches_;
  std::vector<Tensor> weights_, uniform_;
};

}  // namespace capstan::engine
