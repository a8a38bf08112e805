// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Everything rank 0 writes about a run: step lines, metrics.jsonl, TensorBoard. Other ranks have no
// recorder.
#pragma once
#include <cstdio>
#include <functional>
#include <memory>
#include <optional>

#include "capstan/metrics/metrics_file.h"
#include "capstan/metrics/records.h"

namespace capstan::metrics {

struct RecorderOptions {
  Path run_directory;
  int64_t interval_steps = 10;
  int64_t total_steps = 0;  // 0 = open end
  int world_size = 1;
  bool tensorboard = true;
  std::FILE* console = stdout;      // nullptr = no step lines; a closed one is passed over
  std::function<double()> clock_s;  // empty = the system's monotonic clock
};

// Thread-safe. No call throws for a reason of the disk or the console.
class Recorder {
 public:
  explicit Recorder(RecorderOptions options);
  ~Recorder();
  Recorder(const Recorder&) = delete;
  Recorder& operator=(const Recorder&) = delete;

  [[nodiscard]] int attempt() const;
  void start(const StartRecord& record);
  // To be called for every finished step. Written every interval_steps, at the first and last step
  // of the attempt and for skipped steps.
  void step(const StepRecord& record, bool is_last);
  void evaluation(const EvalRecord& record);
  void checkpoint(const CheckpointRecord& record);
  void event(const EventRecord& record);
  void end(const EndRecord& record);
  // Warnings and errors of the log become event lines, from any thread, until the recorder ends.
  void observe_log();
  [[nodiscard]] int64_t dropped() const;  // lines and events lost
  [[nodiscard]] std::optional<double> eta_s() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace capstan::metrics
