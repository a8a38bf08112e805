// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "ranks/device_runs.h"

#include <gtest/gtest.h>

#include <mutex>

#include "support/fake_device/device_ranks.h"
#include "support/fake_device/fake_device.h"
#include "support/run_ranks.h"

namespace capstan::engine::testing {

DeviceOutcome run_on_device(const TinyRun& run) {
  const plan::Plan plan = make_tiny_plan(run);
  device::Accelerator& gpu = test::install_fake_device();
  DeviceOutcome out;
  std::mutex mutex;
  const auto on_rank = [&](comm::Communicator world) {
    const test::BackwardOnThisThread here;
    const int64_t before = gpu.memory().allocated_bytes;
    gpu.reset_peak();
    mesh::Mesh mesh(world, plan.grid);
    Engine engine(plan, mesh);
    std::vector<StepReport> reports;
    int64_t waits = 0;
    for (int step = 0; step < run.steps; ++step) {
      if (step == 2) waits = test::host_syncs();
      engine.start_step(make_batches(plan, mesh.grid().data_parallel_index(world.rank()), step),
                        *make_next_token_objective());
      if (engine.unreported_steps() > 1) reports.push_back(engine.finish_step());
    }
    while (engine.unreported_steps() > 0) reports.push_back(engine.finish_step());
    waits = test::host_syncs() - waits;
    const int64_t peak = gpu.memory().peak_bytes - before;
    const std::string hash = engine.weights_hash();
    const std::lock_guard lock(mutex);
    if (world.rank() == 0) out = {reports, hash, waits, peak};
  };
  // Ranks alone do not communicate by NCCL.
  run.ranks == 1 ? test::run_ranks(1, on_rank) : test::run_device_ranks(run.ranks, on_rank);
  return out;
}

void expect_same_bits(const DeviceOutcome& got, const DeviceOutcome& want) {
  EXPECT_EQ(got.hash, want.hash);
  ASSERT_EQ(got.reports.size(), want.reports.size());
  for (size_t i = 0; i < got.reports.size(); ++i) {
    EXPECT_EQ(got.reports[i].loss, want.reports[i].loss);
    EXPECT_EQ(got.reports[i].grad_norm, want.reports[i].grad_norm);
  }
}

}  // namespace capstan::engine::testing
