// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What a rank holds of the run's state, in global coordinates.
#pragma once
#include <string>
#include <vector>

#include "capstan/mesh/mesh.h"
#include "capstan/mesh/state_entry.h"
#include "capstan/optim/optimizer.h"
#include "capstan/parallel/parallelize.h"

namespace capstan::engine {

// Without optimizer: weights only. optimizer_stores[i]: the store that the optimizer's shard i
// belongs to.
[[nodiscard]] std::vector<mesh::StateEntry> list_state(const parallel::ParallelModel& model,
                                                       optim::Optimizer* optimizer,
                                                       const std::vector<size_t>& optimizer_stores,
                                                       mesh::Mesh& mesh);

// A sum over all elements of mixed (name, global index, bits), hence the same for every layout;
// also checks that replicas hold the same bits. Collective over: world.
[[nodiscard]] std::string hash_weights(const parallel::ParallelModel& model, mesh::Mesh& mesh);

}  // namespace capstan::engine
