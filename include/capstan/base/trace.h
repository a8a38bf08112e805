// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Trace spans: what each rank did when. Emitted anywhere, collected per process, written by
// metrics. When no sink is set a span costs one atomic load.
#pragma once
#include <atomic>
#include <cstdint>
#include <string>
#include <string_view>

namespace capstan::trace {

struct Event {
  std::string name;
  const char* category;  // "compute", "comm", "data", "checkpoint", "optimizer"
  int rank;
  uint64_t thread;
  int64_t begin_ns, end_ns;  // monotonic clock
};

class Sink {
 public:
  virtual ~Sink() = default;
  virtual void add(Event event) = 0;  // called from any thread
};
void set_sink(Sink* sink);  // nullptr = off; the sink must outlive the spans
[[nodiscard]] bool is_on();

// A span from construction to destruction.
class Span {
 public:
  Span(const char* category, std::string_view name);
  ~Span();
  Span(const Span&) = delete;
  Span& operator=(const Span&) = delete;

 private:
  std::string name_;
  const char* category_;
  int64_t begin_ns_;
};

}  // namespace capstan::trace
