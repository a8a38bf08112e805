// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "ranks/comm_backends.h"

#include "capstan/base/check.h"
#include "comm/gloo_job_internal.h"
#include "ranks/nccl_rank.h"
#include "ranks/process_rank.h"
#include "support/gpu_ranks.h"
#include "support/run_ranks.h"

namespace capstan::test {

bool is_real_nccl(Kind kind) { return kind == Kind::kProcess && is_gpu_rank(); }

bool has_bitwise_or(Kind kind) { return kind != Kind::kNccl && !is_real_nccl(kind); }

void run_on(Kind kind, int n, const std::function<void(comm::Communicator world)>& fn,
            double timeout_s) {
  constexpr double kDeadlineSeconds = 75;
  if (kind == Kind::kProcess) {
    const comm::Communicator world = process_world();
    CAPSTAN_CHECK(world.size() == n, "{} processes for a test of {}", world.size(), n);
    world.set_timeout(timeout_s);
    return run_here(world, fn);
  }
  if (kind == Kind::kNccl || kind == Kind::kNcclOverGloo) {
    const Kind control = kind == Kind::kNccl ? Kind::kThreads : Kind::kGloo;
    run_nccl_ranks(n, [&](const NcclRank& rank) { fn(for_cpu_tensors(rank)); },
                   {.control = control, .timeout_s = timeout_s});
    return;
  }
  if (kind == Kind::kThreads) {
    run_ranks(
        n,
        [&](comm::Communicator world) {
          world.set_timeout(timeout_s);
          fn(std::move(world));
        },
        kDeadlineSeconds);
    return;
  }
  const auto store = comm::KeyStore::in_process();
  run_ranks(
      n,
      [&](comm::Communicator thread_world) {
        const auto world = comm::join_local_gloo(store, thread_world.rank(), n, timeout_s);
        try {
          fn(world);
        } catch (const std::exception& e) {
          world.abort(e.what());
          throw;
        }
        // Connections close with the last handle: nobody may leave while another rank still reads.
        world.control().barrier().wait();
      },
      kDeadlineSeconds);
}

}  // namespace capstan::test
