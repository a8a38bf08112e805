// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "engine/step_graph_internal.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <exception>

#include "capstan/base/check.h"
#include "capstan/base/log.h"

namespace capstan::engine {
namespace {

constexpr int kStepsBefore = 2;

// Later steps differ in values, not in shape.
void set(Tensor& fixed, const Tensor& value) {
  if (!value.defined()) return;
  if (!fixed.defined()) fixed = at::empty_like(value);
  CAPSTAN_CHECK(fixed.sizes() == value.sizes(), "a step of another shape than the recorded one");
  fixed.copy_(value);
}

// Starts of fewer documents than there are places for are followed by more of their end.
void set_documents(param::DocumentStarts& fixed, const param::DocumentStarts& made, int64_t places,
                   const Tensor& ids_BT) {
  if (!made.starts.defined()) return;
  if (!fixed.starts.defined() || fixed.starts.numel() < places)
    fixed.starts = at::empty({places}, made.starts.options());
  const int64_t count = made.starts.numel();
  fixed.starts.narrow(0, 0, count).copy_(made.starts);
  fixed.starts.narrow(0, count, places - count).fill_(ids_BT.numel());
  fixed.longest = ids_BT.size(1);
}

}  // namespace

RecordedWork::~RecordedWork() {
  if (graph_.handle) accelerator_.destroy(graph_);
}

void RecordedWork::run(const std::function<void()>& work) {
  if (calls_ < kStepsBefore) {
    ++calls_;
    return work();
  }
  if (!graph_.handle) record(work);
  accelerator_.launch(graph_);
}

void RecordedWork::record(const std::function<void()>& work) {
  device::Accelerator& a = accelerator_;
  const device::Stream here = a.current_stream(), apart = a.create_stream(false);
  const device::Event event = a.create_event();
  a.record(event, here);
  a.wait(apart, event);
  device::Graph made;
  std::exception_ptr failure;
  {
    const device::StreamGuard guard(a, apart);
    a.begin_capture();
    try {
      work();
    } catch (...) {
      failure = std::current_exception();
    }
    made = a.end_capture();
  }
  a.record(event, apart);
  a.wait(here, event);
  a.destroy(event);
  if (failure) {
    a.destroy(made);
    std::rethrow_exception(failure);
  }
  graph_ = made;
}

void RecordedWork::forget() {
  if (!graph_.handle) return;
  accelerator_.synchronize(accelerator_.current_stream());
  accelerator_.destroy(graph_);
  graph_ = {};
  calls_ = kStepsBefore - 1;
}

void StepGraph::load(const std::vector<MicroBatch>& batches, const std::vector<Tensor>& weights) {
  batches_.resize(batches.size());
  weights_.resize(weights.size());
  make_room(batches);
  for (size_t i = 0; i < batches.size(); ++i) {
    const MicroBatch& made = batches[i];
    MicroBatch& fixed = batches_[i];
    Tensor positions_BT = fixed.rows.positions_BT, first_key_BT = fixed.rows.first_key_BT;
    set(fixed.ids_BT, made.ids_BT);
    set(fixed.targets_BT, made.targets_BT);
    set(positions_BT, made.rows.positions_BT);
    set(first_key_BT, made.rows.first_key_BT);
    param::DocumentStarts documents = fixed.rows.documents;
    set_documents(documents, made.rows.documents, places_, made.ids_BT);
    fixed.rows = made.rows;
    fixed.rows.documents = documents;
    fixed.rows.positions_BT = positions_BT;
    fixed.rows.first_key_BT = first_key_BT;
    set(weights_[i], weights[i]);
  }
}

void StepGraph::make_room(const std::vector<MicroBatch>& batches) {
  int64_t places = places_;
  for (const MicroBatch& batch : batches)
    if (const Tensor& starts = batch.rows.documents.starts; starts.defined())
      places = std::max(places, starts.numel());
  if (places == places_) return;
  if (places_ > 0)
    log::info("engine", "a micro-batch of more than {} documents: the step is recorded again",
              places_ - 1);
  places_ = places;
  passes.forget();
  update.forget();
}

}  // namespace capstan::engine
