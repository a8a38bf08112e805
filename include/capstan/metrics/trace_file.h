// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Collects the spans of this process and writes them as Chrome trace JSON (ui.perfetto.dev,
// chrome://tracing): one file per rank, one track per thread.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "capstan/base/file.h"
#include "capstan/base/trace.h"

namespace capstan::metrics {

// Thread-safe. Becomes the sink of base/trace.h by trace::set_sink(&collector).
class TraceCollector : public trace::Sink {
 public:
  // Spans above `limit` are counted, not kept: a forgotten trace must not fill the memory.
  explicit TraceCollector(int64_t limit = 1000000);
  ~TraceCollector() override;
  void add(trace::Event event) override;
  [[nodiscard]] int64_t size() const;
  [[nodiscard]] int64_t dropped() const;
  // Writes trace/step-<first_step>.rank-<rank>.json below `run_directory` for every rank seen and
  // forgets the spans. Spans without a rank go to `default_rank`. Returns the files; a failure is
  // logged, not thrown.
  std::vector<Path> write(const Path& run_directory, int64_t first_step, int default_rank);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace capstan::metrics
