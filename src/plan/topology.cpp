// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include "capstan/base/env.h"
#include "capstan/base/gpu.h"
#include "capstan/plan/plan.h"
#include "plan/resolve_internal.h"

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
  if (static_cast<int>(found.gpus.size()) >= local_size && local_size > 0 && has_cuda_plugin()) {
    topology.device = "cuda";
    topology.fast_bf16 = found.gpus.front().major >= 8;
    if (found.gpus.front().multiprocessors > 0)
      topology.multiprocessors = found.gpus.front().multiprocessors;
    topology.host_memory_bytes = topology.memory_bytes;
    topology.memory_bytes = found.gpus.front().memory_bytes * local_size;
  }
  return topology;
}

std::string gpu_obstacle(int ranks) {
  const GpuProbe& found = probe_gpus();
  const auto count = static_cast<int>(found.gpus.size());
  if (count == 0) return found.problem;
  if (!has_cuda_plugin()) return fmt::format("this build has no {}", cuda_plugin_path());
  if (count < ranks)
    return fmt::format("{} ranks here, and CUDA shows {} of this host's GPUs", ranks, count);
  return "no GPU for every rank is found where the run is placed";
}

}  // namespace capstan::plan
