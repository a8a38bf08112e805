// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/comm/flight_recorder.h"

#include <fmt/format.h>

#include <algorithm>

#include "capstan/base/env.h"

namespace capstan::comm {
namespace {

std::string text_of(const Flight& flight) {
  return fmt::format("{} #{} on {}: {}", flight.what, flight.sequence, flight.axis,
                     name_of(flight.state));
}

bool is_open(const Flight& flight) {
  return flight.state == Flight::State::kIssued || flight.state == Flight::State::kRunning;
}

}  // namespace

const char* name_of(Flight::State state) {
  switch (state) {
    case Flight::State::kIssued:
      return "issued";
    case Flight::State::kRunning:
      return "running";
    case Flight::State::kDone:
      return "done";
    case Flight::State::kFailed:
      return "failed";
  }
  return "unknown";
}

int64_t FlightRecorder::add(Flight flight) {
  flight.issued_ns = monotonic_ns();
  std::lock_guard lock(mutex_);
  const int64_t id = next_++;
  if (id < kCapacity)
    ring_.push_back(std::move(flight));
  else
    ring_[static_cast<size_t>(id % kCapacity)] = std::move(flight);
  return id;
}

void FlightRecorder::begin(int64_t id) {
  std::lock_guard lock(mutex_);
  if (id < next_ - kCapacity || id >= next_) return;  // overwritten meanwhile
  Flight& flight = ring_[static_cast<size_t>(id % kCapacity)];
  flight.begin_ns = monotonic_ns();
  flight.state = Flight::State::kRunning;
}

void FlightRecorder::end(int64_t id, bool ok) {
  std::lock_guard lock(mutex_);
  if (id < next_ - kCapacity || id >= next_) return;
  Flight& flight = ring_[static_cast<size_t>(id % kCapacity)];
  flight.end_ns = monotonic_ns();
  flight.state = ok ? Flight::State::kDone : Flight::State::kFailed;
}

std::vector<Flight> FlightRecorder::flights() const {
  std::lock_guard lock(mutex_);
  std::vector<Flight> ordered;
  ordered.reserve(ring_.size());
  for (int64_t id = std::max<int64_t>(0, next_ - kCapacity); id < next_; ++id)
    ordered.push_back(ring_[static_cast<size_t>(id % kCapacity)]);
  return ordered;
}

std::optional<Flight> FlightRecorder::last() const {
  std::lock_guard lock(mutex_);
  if (next_ == 0) return std::nullopt;
  return ring_[static_cast<size_t>((next_ - 1) % kCapacity)];
}

std::string FlightRecorder::last_text() const {
  const auto flight = last();
  return flight ? text_of(*flight) : "none";
}

std::string FlightRecorder::open_text(size_t limit) const {
  std::string text;
  size_t shown = 0;
  for (const Flight& flight : flights()) {
    if (!is_open(flight)) continue;
    if (shown++ == limit) {
      text += ", ...";
      break;
    }
    text += (text.empty() ? "" : ", ") + text_of(flight);
  }
  return text.empty() ? last_text() : text;
}

}  // namespace capstan::comm
