// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Runs the same test on the backends `threads` and `gloo`; with gloo the ranks are threads of this
// process as well, each with its own connections.
#pragma once
#include <functional>
#include <string>

#include "capstan/comm/communicator.h"

namespace capstan::test {

enum class Kind { kThreads, kGloo };
[[nodiscard]] inline std::string name_of(Kind kind) {
  return kind == Kind::kThreads ? "Threads" : "Gloo";
}

// As run_ranks; `timeout_s` is the deadline of the waits.
void run_on(Kind kind, int n, const std::function<void(comm::Communicator world)>& fn,
            double timeout_s = 20);

}  // namespace capstan::test
