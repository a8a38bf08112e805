// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/base/env.h"
#include "capstan/plan/plan.h"

namespace capstan::plan {

Topology local_topology(int world_size, int local_size) {
  Topology topology;
  topology.world_size = world_size;
  topology.local_size = local_size;
  topology.device = "cpu";
  topology.physical_cores = allowed_physical_cores();
  topology.memory_bytes = memory_limit_bytes();
  topology.fast_bf16 = cpu_has("avx512_bf16") || cpu_has("amx_bf16");
  return topology;
}

}  // namespace capstan::plan
