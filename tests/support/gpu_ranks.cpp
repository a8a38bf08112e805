// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "support/gpu_ranks.h"

#include <fmt/format.h>

#include <cstdlib>

#include "capstan/base/env.h"
#include "capstan/base/gpu.h"
#include "capstan/comm/nccl.h"
#include "capstan/device/accelerator.h"
#include "capstan/device/cuda.h"

namespace capstan::test {
namespace {

constexpr const char* kOnGpu = "CAPSTAN_TEST_GPU";

// Two processes on a GPU are two hosts to NCCL, which refuses one GPU twice on one host.
void start_gpu(int rank) {
  ::setenv("NCCL_HOSTID", fmt::format("capstan-test-rank-{}", rank).c_str(), 1);
  device::start_cuda(0);
}

}  // namespace

std::optional<std::string> missing_gpu() {
  if (const std::string& problem = probe_gpus().problem; !problem.empty()) return problem;
  if (!has_cuda_plugin()) return "this build has no " + cuda_plugin_path();
  return std::nullopt;
}

std::map<std::string, std::string> one_gpu_variables() {
  return {{kOnGpu, "1"},
          {"NCCL_NET", "Socket"},
          {"NCCL_SOCKET_IFNAME", "lo"},
          {"NCCL_IB_DISABLE", "1"},
          {"NCCL_MNNVL_ENABLE", "0"},
          {"NCCL_MAX_CTAS", "2"}};
}

bool is_gpu_rank() { return read_env(kOnGpu).has_value(); }

comm::World meet_ranks(double timeout_s) {
  const comm::RankEnv env = comm::read_rank_env();
  if (is_gpu_rank()) start_gpu(env.rank);
  comm::World world(env, timeout_s);
  if (is_gpu_rank()) world.use_nccl(comm::installed_nccl_api(), *device::accelerator());
  return world;
}

void run_here(const comm::Communicator& world, const std::function<void(comm::Communicator)>& fn) {
  try {
    fn(world);
    world.barrier().wait();
  } catch (const std::exception& error) {
    world.abort(error.what());
    throw;
  }
}

}  // namespace capstan::test
