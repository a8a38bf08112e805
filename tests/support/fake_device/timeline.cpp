// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "support/fake_device/timeline.h"

#include <algorithm>
#include <atomic>
#include <deque>

#include "support/fake_device/capture.h"
#include "support/fake_device/fake_device.h"
#include "support/fake_device/host_copies.h"

namespace capstan::test::fake {
namespace {

struct Timeline {
  std::vector<Clock> streams = {Clock(1)};
  Clock done = Clock(1);  // what the host has waited for
};

Timeline& timeline() {
  static auto* const instance = new Timeline;  // outlives every tensor
  return *instance;
}

std::atomic<int64_t> syncs = 0;
thread_local int64_t thread_syncs = 0;
constexpr size_t kNamedSyncs = 256;
std::deque<const char*>& sync_names() {
  static auto* const names = new std::deque<const char*>;
  return *names;
}
thread_local int thread_stream = 0;

uint64_t at(const Clock& clock, int stream) {
  const auto i = static_cast<size_t>(stream);
  return i < clock.size() ? clock[i] : 0;
}

void raise(Clock& clock, const Clock& to) {
  clock.resize(std::max(clock.size(), to.size()));
  for (size_t i = 0; i < to.size(); ++i) clock[i] = std::max(clock[i], to[i]);
}

Clock& clock_of(int stream) { return timeline().streams.at(static_cast<size_t>(stream)); }

void finish(const Clock& clock) {
  raise(timeline().done, clock);
  settle_host_copies();
}

}  // namespace

std::recursive_mutex& state_mutex() {
  static auto* const mutex = new std::recursive_mutex;
  return *mutex;
}

int create_stream() {
  std::lock_guard lock(state_mutex());
  auto& streams = timeline().streams;
  streams.emplace_back(streams.size() + 1);
  return static_cast<int>(streams.size()) - 1;
}

int current_stream() { return thread_stream; }
void set_current_stream(int stream) { thread_stream = stream; }

Access begin_op(const char* op) {
  std::lock_guard lock(state_mutex());
  return {thread_stream, ++clock_of(thread_stream)[static_cast<size_t>(thread_stream)], op};
}

Access last_op(int stream, const char* op) {
  std::lock_guard lock(state_mutex());
  return {stream, at(clock_of(stream), stream), op};
}

bool is_ordered(const Access& earlier, int stream) {
  std::lock_guard lock(state_mutex());
  return earlier.stream == stream || earlier.tick <= at(clock_of(stream), earlier.stream) ||
         is_done(earlier);
}

bool is_done(const Access& access) {
  std::lock_guard lock(state_mutex());
  return access.tick <= at(timeline().done, access.stream);
}

void record(EventState& event, int stream) {
  std::lock_guard lock(state_mutex());
  event = {clock_of(stream), false};
}

void wait(int stream, const EventState& event) {
  std::lock_guard lock(state_mutex());
  raise(clock_of(stream), event.clock);
}

bool poll(EventState& event) {
  TORCH_CHECK(!is_capturing(), "an event is queried during a capture");
  std::lock_guard lock(state_mutex());
  bool is_past = true;
  for (size_t i = 0; i < event.clock.size(); ++i)
    is_past = is_past && event.clock[i] <= at(timeline().done, static_cast<int>(i));
  if (is_past) return true;
  if (!event.was_polled) {
    event.was_polled = true;
    return false;
  }
  finish(event.clock);
  return true;
}

void synchronize(const EventState& event) {
  std::lock_guard lock(state_mutex());
  count_host_sync("synchronize(event)");
  finish(event.clock);
}

void synchronize_stream(int stream, const char* reason) {
  std::lock_guard lock(state_mutex());
  count_host_sync(reason);
  finish(clock_of(stream));
}

void synchronize_device() {
  std::lock_guard lock(state_mutex());
  count_host_sync("synchronize(device)");
  Clock all;
  for (const Clock& clock : timeline().streams) raise(all, clock);
  finish(all);
}

void count_host_sync(const char* reason) {
  TORCH_CHECK(!is_capturing(), "the host waits during a capture: ", reason);
  std::lock_guard lock(state_mutex());
  ++syncs;
  ++thread_syncs;
  sync_names().push_back(reason);
  if (sync_names().size() > kNamedSyncs) sync_names().pop_front();
}

}  // namespace capstan::test::fake

namespace capstan::test {

int64_t host_syncs() { return fake::syncs; }
int64_t host_syncs_of_thread() { return fake::thread_syncs; }

std::string last_host_syncs(int64_t count) {
  std::lock_guard lock(fake::state_mutex());
  const auto& names = fake::sync_names();
  std::string text;
  const size_t shown = std::min(names.size(), static_cast<size_t>(std::max<int64_t>(count, 0)));
  for (size_t i = names.size() - shown; i < names.size(); ++i)
    text += (text.empty() ? "" : ", ") + std::string(names[i]);
  return text;
}

}  // namespace capstan::test
