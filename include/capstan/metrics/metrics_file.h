// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// metrics.jsonl: appended over all attempts of a run. Losing a line never stops training: the first
// failure is logged, later ones are counted.
#pragma once
#include <cstdint>
#include <map>
#include <memory>

#include "capstan/base/file.h"
#include "capstan/metrics/records.h"

namespace capstan::metrics {

// Thread-safe. One writer per run (rank 0); the lock of the run directory keeps others out.
class MetricsFile {
 public:
  // Cuts a torn last line (no line break at its end) and continues with the next attempt number.
  // A file that cannot be opened is a failure as any other: logged, every line dropped.
  explicit MetricsFile(const Path& path);
  ~MetricsFile();
  MetricsFile(const MetricsFile&) = delete;
  MetricsFile& operator=(const MetricsFile&) = delete;

  [[nodiscard]] int attempt() const;
  // Each writes one line with this attempt's number in place of the record's.
  void write(StartRecord record);
  void write(StepRecord record);
  void write(EvalRecord record);
  void write(CheckpointRecord record);
  void write(EventRecord record);
  void write(EndRecord record);
  void sync();                            // to the disk; a failure is logged once
  [[nodiscard]] int64_t dropped() const;  // lines that were lost

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Number the next attempt of this file would get: one more than the highest in it, 0 for a new
// file.
[[nodiscard]] int next_attempt(const Path& path);

// Steps by number; of a step seen twice the higher attempt wins. Unknown keys and kinds, and lines
// that are no JSON, are passed over.
[[nodiscard]] std::map<int64_t, StepRecord> read_steps(const Path& path);

}  // namespace capstan::metrics
