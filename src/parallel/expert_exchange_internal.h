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

}  // namespace capstan::parallel
