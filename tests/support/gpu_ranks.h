// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Ranks as processes (run_processes.h): over gloo, or all on one GPU over NCCL. For tests that link
// capstan.
#pragma once
#include <functional>
#include <map>
#include <optional>
#include <string>

#include "capstan/comm/world.h"

namespace capstan::test {

// Why no rank can start on a GPU here.
[[nodiscard]] std::optional<std::string> missing_gpu();
// Environment of ranks that share the first GPU.
[[nodiscard]] std::map<std::string, std::string> one_gpu_variables();

// In a rank: whether the environment is that one.
[[nodiscard]] bool is_gpu_rank();
// The job of this process; a rank on a GPU has started it, and NCCL, before.
[[nodiscard]] comm::World meet_ranks(double timeout_s);
// Runs fn in this process and lets the others know when it fails.
void run_here(const comm::Communicator& world, const std::function<void(comm::Communicator)>& fn);

}  // namespace capstan::test
