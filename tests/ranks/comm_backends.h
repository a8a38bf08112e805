// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Runs the same test on the backends `threads`, `gloo` and `nccl`. The ranks are threads of this
// process: with gloo each has its own connections, with nccl a fake device and a fake NCCL
// (nccl_rank.h) above one of the other two. Or this process is one of them (process_rank.h).
#pragma once
#include <functional>
#include <string>

#include "capstan/comm/communicator.h"

namespace capstan::test {

enum class Kind { kThreads, kGloo, kNccl, kNcclOverGloo, kProcess };
[[nodiscard]] inline std::string name_of(Kind kind) {
  constexpr const char* kNames[] = {"Threads", "Gloo", "Nccl", "NcclOverGloo", "Process"};
  return kNames[static_cast<int>(kind)];
}

// NCCL itself sums in an order of its own and need not keep NaN; neither it nor its fake has a
// bitwise or.
[[nodiscard]] bool is_real_nccl(Kind kind);
[[nodiscard]] bool has_bitwise_or(Kind kind);

// As run_ranks; `timeout_s` is the deadline of the waits.
void run_on(Kind kind, int n, const std::function<void(comm::Communicator world)>& fn,
            double timeout_s = 60);

}  // namespace capstan::test
