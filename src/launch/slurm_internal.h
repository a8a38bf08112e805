// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Slurm's two list notations, read as untrusted text: nothing is expanded beyond what is asked for.
#pragma once
#include <string>
#include <string_view>

namespace capstan::launch::internal {

// Entry `node` of SLURM_STEP_TASKS_PER_NODE, such as "2(x3),1" = 2, 2, 2, 1. Throws EnvError when
// the text is none, has no such entry or one outside 1..most.
[[nodiscard]] int tasks_of_node(std::string_view text, int node, int most);
// The first host of SLURM_STEP_NODELIST: "a[01-03,7]-b[2-4],c" gives "a01-b2".
[[nodiscard]] std::string first_host(std::string_view text);

}  // namespace capstan::launch::internal
