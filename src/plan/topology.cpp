// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/base/env.h"
#include "capstan/base/gpu.h"
#include "capstan/plan/plan.h"

namespace capstan::plan {

Topology local_topology(int world_size, int local_size, const std::string& device) {
  Topology topology;
  topology.world_size = world_size;
  topology.local_size = local_size;
  topology.physical_cores = allowed_physical_cores();
  topology.memory_bytes = memory_limit_bytes();
  topology.fast_bf16 = cpu_has("avx512_bf16") || cpu_has("amx_bf16");
  if (device == "cpu") return topology;
  const GpuProbe& found = probe_gpus();
  if (local_size > 0 && gpu_obstacle(local_size).empty()) {
    topology.device = "cuda";
    topology.fast_bf16 = found.gpus.front().major >= 8;
    if (found.gpus.front().multiprocessors > 0)
      topology.multiprocessors = found.gpus.front().multiprocessors;
    topology.host_memory_bytes = topology.memory_bytes;
    topology.memory_bytes = found.gpus.front().memory_bytes * local_size;
  }
  return topology;
}

}  // namespace capstan::plan
