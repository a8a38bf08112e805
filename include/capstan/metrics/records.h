// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The lines of metrics.jsonl as plain structs (docs/metrics.md explains every field). Times are
// filled in by to_json when empty; the attempt is filled in by MetricsFile. Non-finite numbers are
// written as null.
#pragma once
#include <cstdint>
#include <optional>
#include <string>

namespace capstan::metrics {

inline constexpr int kSchemaVersion = 1;

struct StartRecord {
  std::string time;  // UTC ISO 8601; empty = now
  int attempt = 0;
  std::string run, version;  // name of the run; version of the program
  int world_size = 1;
  std::string device;       // "cpu"
  std::string recipe_xxh3;  // of the resolved recipe
  int64_t parameters = 0;
  double flops_per_token = 0;
  std::string flops_convention = "causal";
  int64_t predicted_peak_bytes = 0;
  int64_t resumed_step = 0;
};

// Over all layers with experts.
struct ExpertRecord {
  double load = 1;     // of the layer furthest off: most loaded expert over the mean; 1 = even
  double dropped = 0;  // share of the choices beyond capacity
  double auxiliary_loss = 0, z_loss = 0;  // means over layers, as in the loss of the step
};

struct StepRecord {
  int attempt = 0;
  int64_t step = 0;    // finished steps, this one included
  int64_t tokens = 0;  // since the first step of the run
  int64_t samples = 0;
  double loss = 0;       // mean over the target tokens of this step alone
  double grad_norm = 0;  // before clipping
  double lr = 0;
  double step_ms = 0;  // wall time of the step, data_wait_ms included
  double data_wait_ms = 0;
  double tokens_per_s = 0;    // all ranks together
  std::optional<double> mfu;  // share of the peak, 0..1; none = no peak known
  int64_t peak_bytes = 0;     // counted by the allocator, largest rank
  int64_t rss_bytes = 0;
  int64_t target_tokens = 0;
  std::optional<std::string> skipped;   // why the step changed nothing ("nonfinite gradient")
  std::optional<double> loss_scale;     // fp16 only
  std::optional<ExpertRecord> experts;  // models with experts only; else the keys are left out
  double elapsed_s = 0;                 // since the start of this attempt
};

struct EvalRecord {
  int attempt = 0;
  int64_t step = 0;
  std::string set = "heldout";
  double loss = 0;
  double perplexity = 0;
  std::optional<double> bits_per_byte;  // none = the text's size in bytes is unknown
  int64_t target_tokens = 0;
};

struct CheckpointRecord {
  int attempt = 0;
  int64_t step = 0;
  std::string path;  // relative to the run directory
  int64_t bytes = 0;
  double stall_ms = 0;   // time training waited
  double commit_ms = 0;  // time until the checkpoint was valid
  bool ok = true;
  std::optional<std::string> error;
};

struct EventRecord {
  int attempt = 0;
  int64_t step = 0;
  std::string level;  // "info", "warning", "error"
  std::string module, text;
};

struct EndRecord {
  std::string time;
  int attempt = 0;
  int64_t step = 0;
  int exit = 0;
  std::string cause;  // "done", "preempted", "numerics", ...
};

// One line without the line break.
[[nodiscard]] std::string to_json(const StartRecord& record);
[[nodiscard]] std::string to_json(const StepRecord& record);
[[nodiscard]] std::string to_json(const EvalRecord& record);
[[nodiscard]] std::string to_json(const CheckpointRecord& record);
[[nodiscard]] std::string to_json(const EventRecord& record);
[[nodiscard]] std::string to_json(const EndRecord& record);

}  // namespace capstan::metrics
