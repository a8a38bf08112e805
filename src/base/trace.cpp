// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/base/trace.h"

#include <unistd.h>

#include <utility>

#include "capstan/base/env.h"
#include "capstan/base/log.h"

namespace capstan::trace {

namespace {

std::atomic<Sink*> sink_now{nullptr};

uint64_t thread_id() {
  thread_local const auto id = static_cast<uint64_t>(::gettid());
  return id;
}

}  // namespace

void set_sink(Sink* sink) { sink_now.store(sink, std::memory_order_release); }
bool is_on() { return sink_now.load(std::memory_order_relaxed) != nullptr; }

Span::Span(const char* category, std::string_view name) : category_(category), begin_ns_(-1) {
  if (!is_on()) return;
  name_ = name;
  begin_ns_ = monotonic_ns();
}

Span::~Span() {
  if (begin_ns_ < 0) return;
  Sink* sink = sink_now.load(std::memory_order_acquire);
  if (sink == nullptr) return;
  const int64_t end_ns = monotonic_ns();
  try {
    sink->add({std::move(name_), category_, log::thread_rank(), thread_id(), begin_ns_, end_ns});
  } catch (...) {  // a span that is lost must not end the program
  }
}

}  // namespace capstan::trace
