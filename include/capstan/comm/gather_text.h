// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>
#include <vector>

#include "capstan/comm/communicator.h"

namespace capstan::comm {

// The texts of all ranks, in rank order; bytes of any kind and length, each rank its own. Through
// CPU tensors. Collective over: the group.
[[nodiscard]] std::vector<std::string> gather_text(const Communicator& group,
                                                   const std::string& mine);

}  // namespace capstan::comm
