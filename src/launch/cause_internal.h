// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Which rank was the first to fail by itself.
#pragma once
#include <optional>
#include <span>
#include <string>

#include "capstan/launch/local.h"
#include "launch/rank_process_internal.h"

namespace capstan::launch::internal {

// What is known of one rank when all have ended.
struct RankRecord {
  int rank = 0;
  Path log_directory;
  Outcome outcome;
  int64_t signalled_ns = 0;  // when we told it to stop, 0 = never
  int last_signal = 0;       // the last stop or kill signal we sent
  bool killed = false;       // outlived the grace
  bool declared_done = false;
  bool left_early = false;  // exit 0, undeclared, and the others did not follow within the grace
};

// nullopt when no rank failed by itself. Pure apart from reading error.json and the logs of the
// ranks.
[[nodiscard]] std::optional<RankFailure> find_cause(std::span<const RankRecord> records);
[[nodiscard]] std::vector<std::string> last_lines(const Path& log_directory, size_t most);

}  // namespace capstan::launch::internal
