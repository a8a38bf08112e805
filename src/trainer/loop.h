// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The steps of a run between build and end: data, step, metrics, evaluation, checkpoints, stop.
#pragma once
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "capstan/checkpoint/saver.h"
#include "capstan/data/prefetcher.h"
#include "capstan/data/validation.h"
#include "capstan/engine/engine.h"
#include "capstan/metrics/rate.h"
#include "capstan/metrics/recorder.h"
#include "capstan/metrics/trace_file.h"
#include "capstan/trainer/train.h"

namespace capstan::trainer {

struct LoopInputs {
  const TrainOptions& options;
  const plan::Plan& plan;
  const data::TrainLoader& loader;
  std::string tokenizer_fingerprint;  // empty without a tokenizer
  Path run_directory;
  int64_t resumed_step = 0;
};

class Loop {
 public:
  Loop(LoopInputs inputs, engine::Engine& engine, mesh::Mesh& mesh);
  ~Loop();
  Loop(const Loop&) = delete;
  Loop& operator=(const Loop&) = delete;
  TrainResult run();  // Collective over: world

 private:
  struct Agreed {  // over all ranks
    int stop_signal = 0;
    int64_t peak_bytes = 0;
  };
  class Agreement;

  [[nodiscard]] bool is_first() const { return mesh_.rank() == 0; }
  [[nodiscard]] int64_t step() const { return step_; }  // started steps
  [[nodiscard]] bool is_due(const std::optional<int64_t>& interval) const;
  void open_validation();
  void start_records();
  struct Started {
    int64_t begin_ns = 0;
    double wait_ms = 0;
  };
  void start_step(data::Prefetcher& prefetcher);
  void finish_step();
  void finish_steps(int64_t left);  // until so many are unreported
  [[nodiscard]] bool needs_all_reports() const;
  void record_step(const engine::StepReport& report, double step_ms, double wait_ms);
  void evaluate_all();
  void save(bool wait);
  void report_save(const std::optional<checkpoint::SaveOutcome>& outcome, bool must_succeed);
  void update_trace();
  void end_trace();
  TrainResult finish(int exit_code);

  LoopInputs in_;
  engine::Engine& engine_;
  mesh::Mesh& mesh_;
  std::vector<data::ValidationSet> validation_;
  checkpoint::Saver saver_;
  std::unique_ptr<metrics::Recorder> recorder_;
  metrics::TraceCollector* tracer_ = nullptr;  // while a trace is taken
  data::Documents documents_;
  Agreed agreed_;
  int64_t step_ = 0;
  std::deque<Started> started_;  // without report
  int64_t reported_ns_ = 0;
  double peak_flops_per_rank_ = 0;
  int64_t started_ns_ = 0, last_saved_step_ = -1, last_evaluated_step_ = -1;
  double last_loss_ = 0;
};

}  // namespace capstan::trainer
