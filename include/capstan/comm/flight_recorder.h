// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The last thousand operations of one rank, for the report about a hang. Thread-safe.
#pragma once
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace capstan::comm {

struct Flight {
  enum class State { kIssued, kRunning, kDone, kFailed };
  std::string axis;  // name of the axis and the group's world ranks: "dp_shard[0,1]"
  int64_t sequence;  // counts from 0 per group; for send and recv per pair
  std::string what;  // "all_reduce sum fp32 x 4,096"
  State state = State::kIssued;
  int64_t issued_ns = 0, begin_ns = 0, end_ns = 0;  // monotonic clock; 0 = not yet
};
[[nodiscard]] const char* name_of(Flight::State state);

class FlightRecorder {
 public:
  static constexpr int64_t kCapacity = 1000;

  int64_t add(Flight flight);  // id for the calls below; ids count from 0
  void begin(int64_t id);
  void end(int64_t id, bool ok);

  [[nodiscard]] std::vector<Flight> flights() const;  // oldest first
  [[nodiscard]] std::optional<Flight> last() const;
  // "all_reduce sum fp32 x 4,096 #12 on dp[0,1]: running", or "none" before the first operation.
  [[nodiscard]] std::string last_text() const;
  // The operations still under way, oldest first, else the last finished one; at most `limit`.
  [[nodiscard]] std::string open_text(size_t limit = 4) const;

 private:
  mutable std::mutex mutex_;
  std::vector<Flight> ring_;
  int64_t next_ = 0;
};

}  // namespace capstan::comm
