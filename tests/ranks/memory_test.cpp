// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The plan's peak memory against what the allocator counts, and memory over many steps.
#include <gtest/gtest.h>

#include <ATen/ATen.h>

#include <algorithm>

#include "capstan/device/allocator.h"
#include "capstan/device/threads.h"
#include "capstan/engine/engine.h"

namespace capstan {
namespace {

plan::Plan make_plan(const std::string& model, const std::string& batch,
                     const std::string& compute) {
  const std::string text =
      "version: 1\n"
      "run: {name: memory, steps: 100000, threads: 2}\n"
      "model: {" +
      model +
      "}\n"
      "data: {tokenizer: none, train: [{path: none-needed}]}\n"
      "batch: {" +
      batch +
      "}\n"
      "optimizer: {lr: 1.0e-3}\n"
      "lr_schedule: {kind: constant}\n"
      "precision: {compute: " +
      compute + "}\n";
  return plan::make_plan(recipe::parse_recipe(text, "memory_test"), plan::local_topology(1, 1), {});
}

std::vector<engine::MicroBatch> make_batches(const plan::Plan& plan) {
  const plan::BatchPlan& b = plan.batch;
  std::vector<engine::MicroBatch> batches;
  for (int64_t m = 0; m < b.micro_batches; ++m) {
    engine::MicroBatch batch;
    const at::Tensor row = at::arange(b.micro_samples * b.sequence_length, at::kLong)
                               .view({b.micro_samples, b.sequence_length});
    batch.ids_BT = (row * 7 + m).remainder(plan.model().shape.vocab_size);
    batch.targets_BT = (row * 7 + m + 7).remainder(plan.model().shape.vocab_size);
    batch.rows.positions_BT = at::arange(b.sequence_length, at::kLong)
                                  .expand({b.micro_samples, b.sequence_length})
                                  .contiguous();
    for (int64_t s = 0; s < b.micro_samples; ++s)
      batch.rows.samples.push_back(m * b.micro_samples + s);
    batches.push_back(std::move(batch));
  }
  return batches;
}

class PredictedMemory : public testing::Test {
 protected:
  void SetUp() override {
    device::install_cpu_allocator();
    device::set_threads(2);
  }
  static void expect_as_predicted(const plan::Plan& plan, int steps = 2) {
    const int64_t before = device::stats(0).current_bytes;
    device::reset_peak(0);
    mesh::Mesh mesh;
    engine::Engine engine(plan, mesh);
    const auto objective = engine::make_next_token_objective();
    for (int step = 0; step < steps; ++step) (void)engine.step(make_batches(plan), *objective);
    const int64_t counted = device::stats(0).peak_bytes - before, predicted = plan.memory.peak();
    const int64_t bar = std::max<int64_t>(predicted / 10, 16 << 20);
    EXPECT_LE(std::abs(counted - predicted), bar)
        << "counted " << counted << ", predicted " << predicted;
    std::printf("predicted %.1f MiB, counted %.1f MiB\n", static_cast<double>(predicted) / 1048576,
                static_cast<double>(counted) / 1048576);
  }
};

TEST_F(PredictedMemory, Quickstart) {
  expect_as_predicted(
      make_plan("vocab_size: 8192, hidden_size: 256, intermediate_size: 704, num_hidden_layers: 4, "
                "num_attention_heads: 4, num_key_value_heads: 2",
                "global_samples: 4, micro_samples: 4, sequence_length: 256", "fp32"));
}
TEST_F(PredictedMemory, LargeVocabularyBf16) {
  expect_as_predicted(
      make_plan("vocab_size: 32000, hidden_size: 128, intermediate_size: 352, num_hidden_layers: "
                "2, num_attention_heads: 4, num_key_value_heads: 2",
                "global_samples: 1, micro_samples: 1, sequence_length: 1024", "bf16"),
      1);
}
TEST_F(PredictedMemory, TwelveLayersFourMicroBatchesUntied) {
  expect_as_predicted(
      make_plan("vocab_size: 4096, hidden_size: 256, intermediate_size: 704, num_hidden_layers: "
                "12, num_attention_heads: 4, tie_word_embeddings: false",
                "global_samples: 8, micro_samples: 2, sequence_length: 128", "fp32"));
}

TEST(MemoryOverTime, TenThousandTinySteps_AreFlat) {
  device::install_cpu_allocator();
  device::set_threads(1);
  const plan::Plan plan = make_plan(
      "vocab_size: 64, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, "
      "num_attention_heads: 2",
      "global_samples: 2, micro_samples: 1, sequence_length: 8", "fp32");
  mesh::Mesh mesh;
  engine::Engine engine(plan, mesh);
  const auto objective = engine::make_next_token_objective();
  const auto batches = make_batches(plan);
  for (int step = 0; step < 100; ++step) (void)engine.step(batches, *objective);
  const int64_t bytes = device::stats(0).current_bytes,
                blocks = device::cache_stats().system_allocations;
  device::reset_peak(0);
  const int64_t peak_before = device::stats(0).peak_bytes;
  for (int step = 100; step < 10'000; ++step) (void)engine.step(batches, *objective);
  EXPECT_EQ(device::stats(0).current_bytes, bytes);
  EXPECT_EQ(device::cache_stats().system_allocations, blocks);
  EXPECT_LT(device::stats(0).peak_bytes - peak_before, 1 << 20);
}

}  // namespace
}  // namespace capstan
