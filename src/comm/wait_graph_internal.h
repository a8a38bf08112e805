// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Who waits for whom when a deadline has passed. The peer that a rank waits for is often a victim
// itself; the ranks to look at are those at the end of the chain, which wait for nobody. Pure
// functions.
#pragma once
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "capstan/base/error.h"

namespace capstan::comm {

struct RankStatus {
  bool answered = true;        // false: no sign of life within the time of the report
  std::string waits_in;        // the operation it waits in; empty = it waits for nobody
  std::vector<int> waits_for;  // world ranks that have not come to that operation
  std::string last;            // its last operation, for ranks that wait for nobody
};

// The text of a wait of `rank` that passed its deadline.
[[nodiscard]] ErrorText explain_deadline(int rank, double timeout_s,
                                         const std::map<int, RankStatus>& statuses);

}  // namespace capstan::comm
