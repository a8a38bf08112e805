// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// optimizer.in_backward on the fake device, which device_test.cpp installs: the bits of the run
// without it, steps that the host does not wait for, and their end at a non-finite gradient.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <limits>

#include "capstan/base/error.h"
#include "capstan/ops/device_kernels.h"
#include "ranks/device_runs.h"
#include "support/fake_device/fake_device.h"
#include "support/fake_device/fake_kernels.h"

namespace capstan::engine::testing {
namespace {

TinyRun make_run(std::vector<std::string> overrides) {
  TinyRun run{.overrides = std::move(overrides)};
  run.overrides.insert(run.overrides.end(),
                       {"optimizer.max_grad_norm=none", "batch.micro_samples=8"});
  return run;
}
TinyRun in_backward(TinyRun run) {
  run.overrides.emplace_back("optimizer.in_backward=true");
  return run;
}

// A block of codes is 256 elements.
const std::vector<std::string> kInt8 = {"optimizer.moments=int8", "precision.compute=fp32",
                                        "model.hidden_size=256", "model.intermediate_size=256",
                                        "model.num_hidden_layers=1"};

EngineHooks on_own_thread() {
  thread_local const test::BackwardOnThisThread here;
  return {};
}
const TinyHooks kOnOwnThread{.hooks = [](int) { return on_own_thread(); }, .objective = {}};

class InBackwardOnADevice : public ::testing::TestWithParam<bool> {
 public:
  void SetUp() override {
    if (GetParam()) ops::install_device_kernels(&test::fake_kernels());
  }
  void TearDown() override { ops::install_device_kernels(nullptr); }
};

TEST_P(InBackwardOnADevice, SameBits) {
  std::vector<std::vector<std::string>> runs = {
      {"precision.compute=fp64"},
      {"model.tie_word_embeddings=true"},
      {"precision.compute=bf16"},
      {"precision.compute=fp16", "precision.loss_scale=128"},
      {"optimizer.name=lion", "parallel.recompute.mode=block"},
      {"optimizer.name=sophia", "optimizer.sophia.interval=1"},
      {"model.family=moe", "model.experts.count=4", "model.experts.per_token=2"}};
  if (GetParam()) {
    runs.push_back({"optimizer.moments=bf16", "precision.compute=bf16"});
    runs.push_back({"optimizer.moments=bf16", "precision.compute=bf16", "optimizer.name=sophia",
                    "optimizer.sophia.interval=2"});
    runs.push_back(kInt8);
    runs.push_back(kInt8);
    runs.back().insert(runs.back().begin(), {"optimizer.name=sophia", "optimizer.sophia.interval=1",
                                             "optimizer.lr=1.0e-3"});
  }
  for (const auto& overrides : runs) {
    const TinyRun run = make_run(overrides);
    const TinyResult behind = train(run, kOnOwnThread),
                     within = train(in_backward(run), kOnOwnThread);
    EXPECT_EQ(within.hash, behind.hash) << overrides[0];
    expect_same_run(within, behind, 1e-12);
  }
}

void run_ahead(Engine& engine, int64_t from, int64_t to, std::vector<StepReport>& reports) {
  const auto objective = make_next_token_objective();
  for (int64_t step = from; step < to; ++step) {
    engine.start_step(make_batches(engine.plan(), 0, step), *objective);
    if (engine.unreported_steps() > 1) reports.push_back(engine.finish_step());
  }
  while (engine.unreported_steps() > 0) reports.push_back(engine.finish_step());
}

TEST_P(InBackwardOnADevice, TheHostNeverWaitsInAStep) {
  const TinyRun run = in_backward(make_run({"precision.compute=bf16"}));
  const auto steps = [](int, Engine& engine) {
    ASSERT_TRUE(engine.reports_late());
    std::vector<StepReport> reports;
    run_ahead(engine, 0, 2, reports);
    const int64_t before = test::host_syncs();
    run_ahead(engine, 2, 6, reports);
    const int64_t waits = test::host_syncs() - before;
    EXPECT_EQ(waits, 0) << test::last_host_syncs(waits);
    EXPECT_EQ(reports.size(), 6U);
    EXPECT_EQ(engine.scalars().optimizer_count, 6);
  };
  with_engines(run, steps, kOnOwnThread);
}

TEST_P(InBackwardOnADevice, ANonFiniteGradientEndsTheRun) {
  TinyHooks hooks;
  hooks.hooks = [](int) {
    EngineHooks made = on_own_thread();
    made.before_reduce = [step = -1](int bucket, const Tensor& gradients) mutable {
      if (bucket == 0) ++step;
      if (bucket == 1 && step == 2) gradients.fill_(std::numeric_limits<double>::quiet_NaN());
    };
    return made;
  };
  with_engines(
      in_backward(make_run({})),
      [](int, Engine& engine) {
        std::vector<StepReport> reports;
        EXPECT_THROW(run_ahead(engine, 0, 6, reports), DivergenceError);
        EXPECT_EQ(reports.size(), 2U);
      },
      hooks);
}

TEST_P(InBackwardOnADevice, AStepWithoutTargetsIsSkipped) {
  with_engines(
      in_backward(make_run({})),
      [](int, Engine& engine) {
        auto batches = make_batches(engine.plan(), 0, 0);
        for (MicroBatch& batch : batches) batch.targets_BT.fill_(-100);
        const std::string before = engine.weights_hash();
        EXPECT_EQ(engine.step(batches, *make_next_token_objective()).skipped, "no target tokens");
        EXPECT_EQ(engine.weights_hash(), before);
        EXPECT_EQ(engine.scalars().optimizer_count, 0);
      },
      kOnOwnThread);
}

// The sum of a block travels while the next block computes: neither touches the other's memory.
TEST(InBackwardOnDevices, SameBitsOnRanks) {
  for (const std::vector<std::string>& layout : std::vector<std::vector<std::string>>{
           {"model.tie_word_embeddings=true"},
           {"model.tie_word_embeddings=false", "precision.compute=bf16"},
           {"parallel.zero.stage=1"},
           {"parallel.zero.stage=2", "precision.compute=fp32", "precision.reduction=bf16"},
           {"parallel.zero.stage=3"}}) {
    SCOPED_TRACE(layout.front());
    TinyRun run = make_run(layout);
    run.ranks = 2;
    run.overrides.insert(run.overrides.end(),
                         {"batch.micro_samples=4", "model.num_hidden_layers=4"});
    run.steps = 6;
    TinyRun within = in_backward(run);
    const DeviceOutcome behind = run_on_device(run);
    for (const bool graphs : {false, true}) {
      within.graphs = graphs;
      const DeviceOutcome got = run_on_device(within);
      EXPECT_EQ(got.hash, behind.hash) << graphs;
      for (size_t i = 0; i < behind.reports.size(); ++i)
        EXPECT_EQ(got.reports.at(i).loss, behind.reports[i].loss) << graphs;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Forms, InBackwardOnADevice, ::testing::Bool(),
                         [](const auto& one) { return one.param ? "ByOurKernels" : "ByAten"; });

}  // namespace
}  // namespace capstan::engine::testing
