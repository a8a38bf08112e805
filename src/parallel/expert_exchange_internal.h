// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <vector>

#include "capstan/comm/communicator.h"
#include "capstan/nn/experts.h"

namespace capstan::parallel {

// Agrees on the counts (one exchange on axis "control") and returns the two ways, each one
// all_to_all_v forward and one backward. Collective over: group.
[[nodiscard]] nn::ExpertCut::Exchange exchange_over(const comm::Communicator& group,
                                                    const std::vector<int64_t>& counts_E);

// Rows [E, room, D] to the ranks of their experts, one all_to_all each way; there they come as
// [experts here, ranks, room, D]. Collective over: group.
[[nodiscard]] nn::ExpertCut::Exchange exchange_room_over(const comm::Communicator& group,
                                                         int64_t experts, int64_t room);

}  // namespace capstan::parallel
