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

// Later steps differ in values, not in shape.
void set(Tensor& fixed, const Tensor& value) {
  if (!value.defined()) return;
  if (!fixed.defined()) fixed = at::empty_like(value);
  CAPSTAN_CHECK(fixed.sizes() == value.sizes(), "a step of another shape than the recorded one");
  fixed.copy_(value);
}

// Starts of fewer documents than there are places for are followed by more of their end.
void set_starts(Tensor& fixed, const Tensor& made, int64_t places) {
  if (!made.defined()) return;
  auto sizes = made.sizes().vec();
  const int64_t count = sizes.back();
  sizes.back() = places;
  if (!fixed.defined() || fixed.size(-1) < places) fixed = at::empty(sizes, made.options());
  fixed.narrow(-1, 0, count).copy_(made);
  const Tensor rest = fixed.narrow(-1, count, places - count);
  rest.copy_(made.narrow(-1, count - 1, 1).expand_as(rest));
}

// A recording computes whatever documents could ask for.
void set_documents(param::RowMap& fixed, const param::DocumentStarts& before, int64_t places,
                   int64_t tokens) {
  fixed.lowest_first_key = {};
  const param::DocumentStarts made = fixed.documents;
  if (!made.starts.defined()) return;
  fixed.documents = before;
  set_starts(fixed.documents.starts, made.starts, places);
  set_starts(fixed.documents.chunks_CE, made.chunks_CE, places);
  fixed.documents.longest = fixed.row_length > 0 ? fixed.row_length : tokens;
}

// Places for starts of documents that a micro-batch takes at most.
int64_t most_documents(const std::vector<MicroBatch>& batches) {
  int64_t places = 0;
  for (const MicroBatch& batch : batches)
    if (const Tensor& starts = batch.rows.documents.starts; starts.defined())
      places = std::max(places, starts.numel());
  return places;
}

// What broke it is the failure to report, not that the recording is none.
void end_broken_capture(device::Accelerator& accelerator) {
  try {
    accelerator.destroy(accelerator.end_capture());
  } catch (const std::exception& e) {
    log::debug("engine", "the end of a recording that failed: {}", e.what());
  }
}

}  // namespace

Lane::Lane(device::Accelerator& accelerator)
    : accelerator_(accelerator),
      stream_(accelerator.create_stream(false)),
      event_(accelerator.create_event()),
      pool_(accelerator.create_pool()) {}

Lane::~Lane() {
  accelerator_.destroy(event_);
  accelerator_.destroy(pool_);
}

template <class Work>
void Lane::in_turn(const Work& work) const {
  const device::Stream here = accelerator_.current_stream();
  accelerator_.record(event_, here);
  accelerator_.wait(stream_, event_);
  {
    const device::StreamGuard guard(accelerator_, stream_);
    work();
  }
  accelerator_.record(event_, stream_);
  accelerator_.wait(here, event_);
}

void Lane::run(const std::function<void()>& work) const {
  struct Allocating {
    explicit Allocating(const Lane& own) : lane(own) {
      lane.accelerator_.begin_allocating(lane.pool_);
    }
    ~Allocating() { lane.accelerator_.end_allocating(lane.pool_); }
    Allocating(const Allocating&) = delete;
    Allocating& operator=(const Allocating&) = delete;
    const Lane& lane;
  };
  in_turn([&] {
    const Allocating here(*this);
    work();
  });
}

device::Graph Lane::record(const std::function<void()>& work) const {
  device::Graph made;
  in_turn([&] {
    accelerator_.begin_capture(pool_);
    try {
      work();
    } catch (...) {
      end_broken_capture(accelerator_);
      throw;
    }
    made = accelerator_.end_capture();
  });
  return made;
}

RecordedWork::~RecordedWork() {
  if (graph_.handle) lane_.accelerator().destroy(graph_);
}

void RecordedWork::run(const std::function<void()>& work) {
  if (is_run_next()) {
    ++calls_;
    return lane_.run(work);
  }
  if (!graph_.handle) {
    comm::Ledger& ledger = world_.ledger();
    const comm::Ledger::Table before = ledger.table();
    graph_ = lane_.record(work);
    traffic_ = ledger.take_back(before);
  }
  world_.launch(traffic_, [this] { lane_.accelerator().launch(graph_); });
}

void RecordedWork::forget() {
  calls_ = std::min(calls_, first_calls_ - 1);
  if (!graph_.handle) return;
  device::Accelerator& accelerator = lane_.accelerator();
  accelerator.synchronize(accelerator.current_stream());
  accelerator.destroy(graph_);
  graph_ = {};
}

void StepGraph::load(const std::vector<MicroBatch>& batches, const std::vector<Tensor>& weights) {
  batches_.resize(batches.size());
  weights_.resize(weights.size());
  for (size_t i = 0; i < batches.size(); ++i) {
    const MicroBatch& made = batches[i];
    MicroBatch& fixed = batches_[i];
    Tensor positions_BT = fixed.rows.positions_BT, first_key_BT = fixed.rows.first_key_BT;
    set(fixed.ids_BT, made.ids_BT);
    set(fixed.targets_BT, made.targets_BT);
    set(positions_BT, made.rows.positions_BT);
    set(first_key_BT, made.rows.first_key_BT);
    const param::DocumentStarts before = fixed.rows.documents;
    const Tensor row_index_T = fixed.rows.row_index_T;
    fixed.rows = made.rows;
    set_documents(fixed.rows, before, places_, made.ids_BT.size(1));
    if (row_index_T.defined()) fixed.rows.row_index_T = row_index_T;  // the same in every step
    fixed.rows.positions_BT = positions_BT;
    fixed.rows.first_key_BT = first_key_BT;
    set(weights_[i], weights[i]);
  }
}

void StepGraph::load_curvature(const std::vector<Tensor>& uniform) {
  if (curvature.is_run_next() || passes.is_run_next()) forget();
  uniform_.resize(uniform.size());
  for (size_t i = 0; i < uniform.size(); ++i) set(uniform_[i], uniform[i]);
}

bool StepGraph::needs_room(const std::vector<MicroBatch>& batches) const {
  return most_documents(batches) > places_;
}

void StepGraph::make_room(const std::vector<MicroBatch>& batches) {
  if (places_ > 0)
    log::info("engine", "a micro-batch of more than {} documents: the step is recorded again",
              places_ - 1);
  places_ = std::max(places_, most_documents(batches));
  forget();
}

void StepGraph::forget() {
  for (RecordedWork* const work : {&curvature, &passes, &update}) work->forget();
}

}  // namespace capstan::engine
