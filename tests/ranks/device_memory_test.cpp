// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The plan's peak memory of a GPU against what the fake device counts, whose attention holds what
// LibTorch's allocates.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <gtest/gtest.h>

#include "capstan/device/accelerator.h"
#include "capstan/ops/device_kernels.h"
#include "ranks/engine_fixture.h"
#include "support/fake_device/device_ranks.h"
#include "support/fake_device/fake_device.h"
#include "support/fake_device/fake_kernels.h"
#include "support/run_ranks.h"

namespace capstan::engine {
namespace {

using testing::make_tiny_plan;
using testing::TinyRun;

struct Case {
  const char* name;
  std::vector<std::string> overrides;
  bool in_order = false;  // run.deterministic
};

// Of tensors on the device.
int64_t predicted(const TinyRun& run, bool in_order) {
  plan::Plan plan = make_tiny_plan(run);
  plan.resolved.run.device = "cuda";
  plan.resolved.run.deterministic = in_order;
  const plan::MemoryReport m = plan::report_memory(plan, 0);
  return m.needed() - m.device;
}

// Documents are rows, as many as the plan assumes.
int64_t counted_peak(const TinyRun& run) {
  const plan::Plan plan = make_tiny_plan(run);
  const bool separate = plan.resolved.data.documents == "separate";
  device::Accelerator& gpu = test::install_fake_device();
  int64_t peak = 0;
  test::run_ranks(1, [&](comm::Communicator world) {
    const test::BackwardOnThisThread here;
    const int64_t before = gpu.memory().allocated_bytes;
    gpu.reset_peak();
    mesh::Mesh mesh(world, plan.grid);
    Engine engine(plan, mesh);
    for (int step = 0; step < run.steps; ++step) {
      auto batches = testing::make_batches(plan, 0, step);
      for (MicroBatch& batch : batches)
        batch.rows.first_key_BT = separate ? at::zeros_like(batch.rows.first_key_BT) : at::Tensor();
      (void)engine.step(std::move(batches), *make_next_token_objective());
    }
    peak = gpu.memory().peak_bytes - before;
  });
  return peak;
}

class DeviceMemoryByPlan : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    ops::install_device_kernels(&test::fake_kernels());
    at::globalContext().setDeterministicAlgorithms(GetParam().in_order, false);
  }
  void TearDown() override {
    ops::install_device_kernels(nullptr);
    at::globalContext().setDeterministicAlgorithms(false, false);
  }
};

TEST_P(DeviceMemoryByPlan, IsWhatTheDeviceCounts) {
  // Attention is most of what a layer needs: its heads are wider than its features.
  TinyRun run{
      .steps = 1,
      .overrides = {"model.hidden_size=64", "model.intermediate_size=64",
                    "model.num_hidden_layers=3", "model.num_attention_heads=8",
                    "model.num_key_value_heads=8", "model.head_dim=32", "batch.global_samples=8",
                    "batch.micro_samples=8", "batch.sequence_length=128", "data.documents=joined"}};
  run.overrides.insert(run.overrides.end(), GetParam().overrides.begin(),
                       GetParam().overrides.end());
  const auto counted = static_cast<double>(counted_peak(run)),
             by_plan = static_cast<double>(predicted(run, GetParam().in_order));
  std::printf("%s: predicted %.2f MiB, counted %.2f MiB (%+.1f %%)\n", GetParam().name,
              by_plan / 1048576, counted / 1048576, 100 * (counted - by_plan) / by_plan);
  EXPECT_NEAR(counted, by_plan, by_plan / 20);
}

const char *const kBf16 = "precision.compute=bf16", *const kFp32 = "precision.compute=fp32",
                  *const kGrouped = "model.num_key_value_heads=2",
                  *const kSeparate = "data.documents=separate";

INSTANTIATE_TEST_SUITE_P(
    Runs, DeviceMemoryByPlan,
    ::testing::Values(Case{"bf16", {kBf16}}, Case{"bf16_grouped", {kBf16, kGrouped}},
                      Case{"bf16_padded_heads", {kBf16, "model.head_dim=40"}},
                      Case{"bf16_short_rows", {kBf16, "batch.sequence_length=80"}},
                      Case{"bf16_in_order", {kBf16}, true},
                      Case{"bf16_in_order_grouped", {kBf16, kGrouped}, true},
                      Case{"bf16_documents", {kBf16, kGrouped, kSeparate}},
                      Case{"bf16_accumulated", {kBf16, kGrouped, "batch.micro_samples=4"}},
                      Case{"bf16_block", {kBf16, kGrouped, "parallel.recompute.mode=block"}},
                      Case{"bf16_selective",
                           {kBf16, kGrouped,
                            "parallel.recompute={mode: selective, parts: [attention, mlp, norm]}"}},
                      Case{"bf16_plain", {kBf16, "model.head_dim=36"}},
                      Case{"bf16_residual", {kBf16, kGrouped, "precision.residual=bf16"}},
                      Case{"fp32", {kFp32}}, Case{"fp32_grouped", {kFp32, kGrouped}},
                      Case{"fp32_documents", {kFp32, kGrouped, kSeparate}},
                      Case{"fp32_block", {kFp32, "parallel.recompute.mode=block"}},
                      Case{"bf16_feed_forward", {kBf16, kGrouped, "model.intermediate_size=512"}},
                      Case{"fp32_feed_forward", {kFp32, kGrouped, "model.intermediate_size=512"}}),
    [](const auto& c) { return std::string(c.param.name); });

}  // namespace
}  // namespace capstan::engine
