// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/metrics/trace_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <set>

#include "capstan/base/error.h"
#include "capstan/base/json.h"
#include "capstan/base/log.h"

namespace capstan::metrics {

namespace {

std::string quoted(const std::string& text) {
  return json::Json(text).dump(-1, ' ', false, json::Json::error_handler_t::replace);
}

// Trace times are in microseconds; three decimals keep the nanoseconds.
std::string microseconds(int64_t ns) { return fmt::format("{}.{:03}", ns / 1000, ns % 1000); }

std::string format_trace(int rank, const std::vector<trace::Event>& events) {
  std::string out = "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n";
  out += fmt::format(
      R"({{"name":"process_name","ph":"M","pid":{0},"tid":0,"args":{{"name":"rank {0}"}}}})", rank);
  out += fmt::format(
      ",\n"
      R"({{"name":"process_sort_index","ph":"M","pid":{0},"tid":0,"args":{{"sort_index":{0}}}}})",
      rank);
  std::set<uint64_t> threads;
  for (const trace::Event& event : events) {
    if (threads.insert(event.thread).second) {
      out += fmt::format(
          ",\n"
          R"({{"name":"thread_name","ph":"M","pid":{},"tid":{},"args":{{"name":"thread {}"}}}})",
          rank, event.thread, threads.size() - 1);
    }
    out += fmt::format(
        ",\n"
        R"({{"name":{},"cat":"{}","ph":"X","ts":{},"dur":{},"pid":{},"tid":{}}})",
        quoted(event.name), event.category, microseconds(event.begin_ns),
        microseconds(std::max<int64_t>(0, event.end_ns - event.begin_ns)), rank, event.thread);
  }
  return out + "\n]}\n";
}

}  // namespace

struct TraceCollector::State {
  mutable std::mutex mutex;
  int64_t limit = 0, dropped = 0;
  std::vector<trace::Event> events;
};

TraceCollector::TraceCollector(int64_t limit) : state_(std::make_unique<State>()) {
  state_->limit = limit;
}
TraceCollector::~TraceCollector() = default;

void TraceCollector::add(trace::Event event) {
  const std::lock_guard lock(state_->mutex);
  if (static_cast<int64_t>(state_->events.size()) >= state_->limit) {
    ++state_->dropped;
    return;
  }
  state_->events.push_back(std::move(event));
}

int64_t TraceCollector::size() const {
  const std::lock_guard lock(state_->mutex);
  return static_cast<int64_t>(state_->events.size());
}

int64_t TraceCollector::dropped() const {
  const std::lock_guard lock(state_->mutex);
  return state_->dropped;
}

std::vector<Path> TraceCollector::write(const Path& run_directory, int64_t first_step,
                                        int default_rank) {
  std::map<int, std::vector<trace::Event>> by_rank;
  {
    const std::lock_guard lock(state_->mutex);
    for (trace::Event& event : state_->events) {
      by_rank[event.rank < 0 ? default_rank : event.rank].push_back(std::move(event));
    }
    state_->events.clear();
  }
  if (const int64_t lost = dropped(); lost > 0) {
    log::warning("metrics", "{} trace spans above the limit were left out", lost);
  }
  std::vector<Path> files;
  for (auto& [rank, events] : by_rank) {
    // Viewers nest spans of one start time by their order: the longer one first.
    std::stable_sort(events.begin(), events.end(), [](const auto& a, const auto& b) {
      return a.begin_ns != b.begin_ns ? a.begin_ns < b.begin_ns : a.end_ns > b.end_ns;
    });
    const Path path =
        run_directory / "trace" / fmt::format("step-{:08}.rank-{}.json", first_step, rank);
    try {
      create_directories_durable(path.parent_path());
      write_file_atomic(path, format_trace(rank, events));
      files.push_back(path);
    } catch (const Error& error) {
      log::warning("metrics", "no trace was written: {}", error.what());
    }
  }
  return files;
}

}  // namespace capstan::metrics
