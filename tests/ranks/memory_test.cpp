// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The plan's peak memory against what the allocator counts, and memory over many steps.
#include <gtest/gtest.h>

#include <ATen/ATen.h>

#include <algorithm>
#include <mutex>

#include "capstan/device/allocator.h"
#include "capstan/device/threads.h"
#include "capstan/engine/engine.h"
#include "support/run_ranks.h"

namespace capstan {
namespace {

plan::Plan make_plan(const std::string& model, const std::string& batch,
                     const std::string& precision) {
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
      precision + "}\n";
  return plan::make_plan(recipe::parse_recipe(text, "memory_test"),
                         plan::local_topology(1, 1, "cpu"), {});
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

int64_t plan_data_bytes(const std::vector<engine::MicroBatch>& batches) {
  int64_t bytes = 0;
  for (const auto& batch : batches)
    for (const at::Tensor& x : {batch.ids_BT, batch.targets_BT, batch.rows.positions_BT})
      bytes += plan::allocation_bytes(static_cast<int64_t>(x.nbytes()));
  return bytes;
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
    const int64_t bar = std::max<int64_t>(predicted / 20, 8 << 20);
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

// Casts of weights that stay, and factors on the way of a product.
TEST_F(PredictedMemory, Fp8) {
  for (const char* scaling : {"tensor", "row"})
    expect_as_predicted(
        make_plan("vocab_size: 512, hidden_size: 256, intermediate_size: 1408, "
                  "num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2",
                  "global_samples: 16, micro_samples: 16, sequence_length: 256",
                  std::string("bf16, fp8: {scaling: ") + scaling + "}"),
        1);
}

// Layouts on thread ranks; every rank against the plan's report for it. Threads of one process sum
// in place, so that what the plan adds for staging between processes is left out.
struct LayoutRecipe {
  const char* name;
  int ranks;
  std::string model, batch, parallel;
  std::string compute = "fp32", reduction = "auto", keep_fp32 = "[]", optimizer = "";
  int64_t least_mib = 256;  // below, the bar would hide too much
  int steps = 1;
};

plan::Plan make_layout_plan(const LayoutRecipe& recipe) {
  const std::string text =
      "version: 1\n"
      "run: {name: memory, steps: 100, threads: 1}\n"
      "model: {" +
      recipe.model +
      "}\n"
      "data: {tokenizer: none, train: [{path: none-needed}]}\n"
      "batch: {" +
      recipe.batch +
      "}\n"
      "optimizer: {lr: 1.0e-3" +
      recipe.optimizer +
      "}\n"
      "lr_schedule: {kind: constant}\n"
      "precision: {compute: " +
      recipe.compute + ", reduction: " + recipe.reduction + ", keep_fp32: " + recipe.keep_fp32 +
      "}\n"
      "parallel: {" +
      recipe.parallel + "}\n";
  return plan::make_plan(recipe::parse_recipe(text, "memory_test"),
                         plan::local_topology(recipe.ranks, recipe.ranks, "cpu"), {});
}

class PredictedLayoutMemory : public testing::TestWithParam<LayoutRecipe> {
 protected:
  static void expect_near(int64_t counted, int64_t predicted, const plan::MemoryReport& m,
                          int64_t share = 20) {
    EXPECT_GE(counted, GetParam().least_mib << 20) << "rank " << m.rank;
    EXPECT_LE(std::abs(counted - predicted), std::max<int64_t>(predicted / share, 8 << 20))
        << "rank " << m.rank << ": parameters " << (m.parameters >> 20) << ", master "
        << (m.master >> 20) << ", gradients " << (m.gradients >> 20) << ", optimizer "
        << (m.optimizer >> 20) << ", activations " << (m.activations >> 20) << ", workspace "
        << (m.workspace >> 20) << ", data " << (m.data >> 20) << " MiB";
  }
};

TEST_P(PredictedLayoutMemory, OnEveryRank) {
  device::install_cpu_allocator();
  const plan::Plan plan = make_layout_plan(GetParam());
  std::mutex mutex;
  int64_t all_counted = 0, all_predicted = 0;
  test::run_ranks(
      plan.grid.size(),
      [&](comm::Communicator world) {
        const int rank = world.rank();
        const auto batches = make_batches(plan);
        world.barrier().wait();
        const int64_t before = device::stats(rank).current_bytes - plan_data_bytes(batches);
        device::reset_peak(rank);
        {
          mesh::Mesh mesh(world, plan.grid);
          engine::Engine engine(plan, mesh, {.initializes = false});
          const auto objective = engine::make_next_token_objective();
          for (int step = 0; step < GetParam().steps; ++step)
            (void)engine.step(batches, *objective);
        }
        const plan::MemoryReport m = plan::report_memory(plan, rank);
        const int64_t counted = device::stats(rank).peak_bytes - before,
                      predicted = m.peak() - m.communication;
        const std::lock_guard lock(mutex);
        all_counted += counted;
        all_predicted += predicted;
        // Experts spread over ranks get what routers choose; the plan holds the load to be even.
        if (plan.grid.sizes().ep == 1) expect_near(counted, predicted, m);
        std::printf(
            "%s rank %d: predicted %.1f MiB, counted %.1f MiB (%+.1f %%)\n", GetParam().name, rank,
            static_cast<double>(predicted) / 1048576, static_cast<double>(counted) / 1048576,
            100.0 * static_cast<double>(counted - predicted) / static_cast<double>(predicted));
      },
      120);
  // Uneven parts are rounded up by up to an eighth, even ones of these sizes by nothing.
  const int64_t share = plan.grid.sizes().ep == 1 ? 20 : 10;
  expect_near(all_counted / plan.grid.size(), all_predicted / plan.grid.size(), plan.memory, share);
}

// Few wide layers for storage, many tokens in narrow ones for activations.
const std::string kWide =
    "vocab_size: 8192, hidden_size: 1024, intermediate_size: 2816, num_hidden_layers: 2, "
    "num_attention_heads: 8, num_key_value_heads: 2";
// An offloaded shard on its way to the device stays until the slowest rank has it: small beside
// the whole.
const std::string kDeep =
    "vocab_size: 2048, hidden_size: 768, intermediate_size: 2048, num_hidden_layers: 8, "
    "num_attention_heads: 8, num_key_value_heads: 2";
const std::string kNarrow =
    "vocab_size: 512, hidden_size: 128, intermediate_size: 352, num_hidden_layers: 8, "
    "num_attention_heads: 4, num_key_value_heads: 2, tie_word_embeddings: false";

// One key head for eight query heads that are wider than the model.
const std::string kGrouped =
    "vocab_size: 512, hidden_size: 128, intermediate_size: 256, num_hidden_layers: 6, "
    "num_attention_heads: 8, num_key_value_heads: 1, head_dim: 32, tie_word_embeddings: false";
const std::string kVocabulary =
    "vocab_size: 50000, hidden_size: 128, intermediate_size: 352, num_hidden_layers: 2, "
    "num_attention_heads: 4, num_key_value_heads: 2";

const std::string kQwen3 = ", qk_norm: true";

const std::string kGpt2 =
    "family: gpt2, vocab_size: 512, hidden_size: 128, intermediate_size: 512, num_hidden_layers: "
    "8, num_attention_heads: 4";

const std::string kExperts =
    "family: moe, vocab_size: 512, hidden_size: 128, intermediate_size: 176, num_hidden_layers: 4, "
    "num_attention_heads: 4, num_key_value_heads: 2, tie_word_embeddings: false, experts: {count: "
    "8, per_token: 2, shared_intermediate_size: 176}";

INSTANTIATE_TEST_SUITE_P(
    Layouts, PredictedLayoutMemory,
    testing::Values(
        LayoutRecipe{"tensor", 2, kWide,
                     "global_samples: 2, micro_samples: 2, sequence_length: 256", "tensor: 2"},
        LayoutRecipe{"tensor_sequence", 2, kNarrow,
                     "global_samples: 32, micro_samples: 32, sequence_length: 256",
                     "tensor: 2, sequence: true"},
        LayoutRecipe{"tensor_sequence_overlap", 2, kNarrow,
                     "global_samples: 32, micro_samples: 32, sequence_length: 256",
                     "tensor: 2, sequence: true, sequence_overlap: true"},
        LayoutRecipe{"one_forward_one_backward", 2, kNarrow,
                     "global_samples: 120, micro_samples: 30, sequence_length: 256",
                     "pipeline: {size: 2, schedule: 1f1b}"},
        LayoutRecipe{"gpipe_recompute", 2, kNarrow,
                     "global_samples: 240, micro_samples: 20, sequence_length: 256",
                     "pipeline: {size: 2, schedule: gpipe}, recompute: {mode: block}"},
        LayoutRecipe{"gpipe_selective", 2, kNarrow,
                     "global_samples: 220, micro_samples: 22, sequence_length: 256",
                     "pipeline: {size: 2, schedule: gpipe}, "
                     "recompute: {mode: selective, parts: [attention, mlp, norm]}"},
        LayoutRecipe{"selective_norm", 2, kNarrow,
                     "global_samples: 56, micro_samples: 28, sequence_length: 256",
                     "recompute: {mode: selective, parts: [norm]}"},
        LayoutRecipe{"selective_attention", 2, kNarrow,
                     "global_samples: 40, micro_samples: 40, sequence_length: 256",
                     "tensor: 2, sequence: true, recompute: {mode: selective, parts: [attention]}"},
        LayoutRecipe{"selective_mlp_offload", 2, kNarrow,
                     "global_samples: 64, micro_samples: 32, sequence_length: 256",
                     "recompute: {mode: selective, parts: [mlp]}, offload_activations: true"},
        LayoutRecipe{"gpipe_recompute_offload", 2, kNarrow,
                     "global_samples: 240, micro_samples: 20, sequence_length: 256",
                     "pipeline: {size: 2, schedule: gpipe}, recompute: {mode: block}, "
                     "offload_activations: true"},
        LayoutRecipe{"interleaved", 2, kNarrow,
                     "global_samples: 80, micro_samples: 20, sequence_length: 256",
                     "pipeline: {size: 2, schedule: interleaved, chunks: 2}"},
        LayoutRecipe{"zero_bubble", 2, kNarrow,
                     "global_samples: 64, micro_samples: 16, sequence_length: 256",
                     "pipeline: {size: 2, schedule: zero_bubble}"},
        LayoutRecipe{"zero_bubble_v", 2, kNarrow,
                     "global_samples: 64, micro_samples: 16, sequence_length: 256",
                     "pipeline: {size: 2, schedule: zero_bubble, chunks: 2}"},
        LayoutRecipe{"zero_bubble_fp8", 2, kNarrow,
                     "global_samples: 32, micro_samples: 16, sequence_length: 256",
                     "pipeline: {size: 2, schedule: zero_bubble}", "bf16, fp8: {scaling: tensor}",
                     "auto", "[]", "", 96},
        LayoutRecipe{"tensor_sequence_fp8", 2, kNarrow,
                     "global_samples: 24, micro_samples: 24, sequence_length: 256",
                     "tensor: 2, sequence: true", "bf16, fp8: {scaling: row}", "auto", "[]", "",
                     96},
        LayoutRecipe{"ring", 2, kNarrow,
                     "global_samples: 32, micro_samples: 32, sequence_length: 256",
                     "context: {size: 2}"},
        LayoutRecipe{"all_to_all", 2, kNarrow,
                     "global_samples: 32, micro_samples: 32, sequence_length: 256",
                     "context: {size: 2, method: all_to_all}"},
        LayoutRecipe{"norms_of_heads", 2, kNarrow + kQwen3,
                     "global_samples: 48, micro_samples: 24, sequence_length: 256", "data: 2"},
        LayoutRecipe{"norms_of_heads_tensor_selective", 2, kNarrow + kQwen3,
                     "global_samples: 40, micro_samples: 40, sequence_length: 256",
                     "tensor: 2, sequence: true, recompute: {mode: selective, parts: [attention]}"},
        LayoutRecipe{"norms_of_heads_all_to_all", 2, kNarrow + kQwen3,
                     "global_samples: 32, micro_samples: 32, sequence_length: 256",
                     "context: {size: 2, method: all_to_all}"},
        LayoutRecipe{"norms_of_heads_zero_bubble", 2, kNarrow + kQwen3,
                     "global_samples: 64, micro_samples: 16, sequence_length: 256",
                     "pipeline: {size: 2, schedule: zero_bubble}"},
        LayoutRecipe{"gpt2", 2, kGpt2,
                     "global_samples: 64, micro_samples: 32, sequence_length: 256", "data: 2"},
        LayoutRecipe{"gpt2_bf16", 2, kGpt2,
                     "global_samples: 64, micro_samples: 32, sequence_length: 256", "data: 2",
                     "bf16"},
        LayoutRecipe{"gpt2_tensor_sequence", 2, kGpt2,
                     "global_samples: 32, micro_samples: 32, sequence_length: 256",
                     "tensor: 2, sequence: true"},
        LayoutRecipe{"gpt2_selective", 2, kGpt2,
                     "global_samples: 128, micro_samples: 64, sequence_length: 256",
                     "recompute: {mode: selective, parts: [attention, mlp, norm]}"},
        LayoutRecipe{"gpt2_zero_bubble", 2, kGpt2,
                     "global_samples: 64, micro_samples: 16, sequence_length: 256",
                     "pipeline: {size: 2, schedule: zero_bubble}"},
        LayoutRecipe{"gpt2_fp8", 2, kGpt2,
                     "global_samples: 20, micro_samples: 10, sequence_length: 256", "data: 2",
                     "bf16, fp8: {scaling: tensor}", "auto", "[]", "", 96},
        LayoutRecipe{"experts", 2, kExperts,
                     "global_samples: 64, micro_samples: 32, sequence_length: 256",
                     "expert: 2, zero: {stage: 1}"},
        LayoutRecipe{"experts_tensor_selective", 2, kExperts,
                     "global_samples: 40, micro_samples: 40, sequence_length: 256",
                     "tensor: 2, expert: 2, recompute: {mode: selective, parts: [norm]}"},
        LayoutRecipe{"experts_zero_bubble", 2, kExperts,
                     "global_samples: 128, micro_samples: 32, sequence_length: 256",
                     "pipeline: {size: 2, schedule: zero_bubble}"},
        LayoutRecipe{"experts_selective_mlp", 2, kExperts,
                     "global_samples: 96, micro_samples: 48, sequence_length: 256",
                     "expert: 2, zero: {stage: 1}, recompute: {mode: selective, parts: [mlp]}"},
        LayoutRecipe{"zero_1_offload", 4, kWide,
                     "global_samples: 4, micro_samples: 1, sequence_length: 64",
                     "zero: {stage: 1, offload: optimizer}"},
        LayoutRecipe{"zero_2", 2, kWide, "global_samples: 8, micro_samples: 2, sequence_length: 64",
                     "zero: {stage: 2}"},
        LayoutRecipe{"copies_summed_in_bf16", 2, kWide,
                     "global_samples: 4, micro_samples: 2, sequence_length: 64", "data: 2", "bf16",
                     "bf16"},
        LayoutRecipe{"zero_2_summed_in_bf16", 2, kWide,
                     "global_samples: 8, micro_samples: 2, sequence_length: 64", "zero: {stage: 2}",
                     "fp32", "bf16"},
        LayoutRecipe{"frozen_parts", 2, kWide + ", frozen: ['*embed_tokens*', '*.0.self_attn.*']",
                     "global_samples: 4, micro_samples: 2, sequence_length: 64", "data: 2"},
        LayoutRecipe{"frozen_front", 2,
                     kNarrow + ", frozen: ['*embed_tokens*', '*.0.*', '*.1.*', '*.2.*']",
                     "global_samples: 64, micro_samples: 32, sequence_length: 256", "data: 2"},
        LayoutRecipe{"zero_3", 2, kWide, "global_samples: 8, micro_samples: 2, sequence_length: 64",
                     "zero: {stage: 3}"},
        LayoutRecipe{"zero_3_kept_bf16", 2, kWide,
                     "global_samples: 2, micro_samples: 1, sequence_length: 32",
                     "zero: {stage: 3, reshard_after_forward: false, prefetch: 2}", "bf16"},
        LayoutRecipe{"zero_1_norms_kept_bf16", 2, kWide,
                     "global_samples: 4, micro_samples: 2, sequence_length: 64", "zero: {stage: 1}",
                     "bf16", "fp32", "['*norm*', '*embed_tokens*']"},
        LayoutRecipe{"grouped_heads_zero_1_accumulated_bf16", 2, kGrouped,
                     "global_samples: 96, micro_samples: 24, sequence_length: 256",
                     "zero: {stage: 1}", "bf16", "auto", "[]", "", 96},
        LayoutRecipe{"grouped_heads_zero_2_block_bf16", 2, kGrouped,
                     "global_samples: 192, micro_samples: 48, sequence_length: 256",
                     "zero: {stage: 2}, recompute: {mode: block}", "bf16", "auto", "[]", "", 96},
        LayoutRecipe{
            "grouped_heads_zero_3_selective_bf16", 2, kGrouped,
            "global_samples: 128, micro_samples: 32, sequence_length: 256",
            "zero: {stage: 3}, recompute: {mode: selective, parts: [attention, mlp, norm]}", "bf16",
            "auto", "[]", "", 80},
        LayoutRecipe{"large_vocabulary_bf16", 1, kVocabulary,
                     "global_samples: 16, micro_samples: 8, sequence_length: 256", "data: 1",
                     "bf16", "auto", "[]", "", 96},
        LayoutRecipe{"large_vocabulary_sophia", 1, kVocabulary,
                     "global_samples: 8, micro_samples: 8, sequence_length: 256", "data: 1", "fp32",
                     "auto", "[]", ", name: sophia, sophia: {interval: 1}", 96, 2},
        LayoutRecipe{"lion", 2, kWide, "global_samples: 4, micro_samples: 2, sequence_length: 64",
                     "data: 2", "fp32", "auto", "[]", ", name: lion"},
        LayoutRecipe{"moments_bf16", 2, kWide,
                     "global_samples: 8, micro_samples: 2, sequence_length: 64",
                     "zero: {stage: 2}, data: 2", "bf16", "fp32", "[]", ", moments: bf16"},
        LayoutRecipe{"in_backward", 2, kDeep,
                     "global_samples: 2, micro_samples: 1, sequence_length: 64", "data: 2", "fp32",
                     "auto", "[]", ", in_backward: true, max_grad_norm: none"},
        LayoutRecipe{"in_backward_zero_1", 2, kDeep,
                     "global_samples: 2, micro_samples: 1, sequence_length: 64", "zero: {stage: 1}",
                     "fp32", "auto", "[]", ", in_backward: true, max_grad_norm: none"},
        LayoutRecipe{"in_backward_zero_2_reduced_bf16", 2, kDeep,
                     "global_samples: 2, micro_samples: 1, sequence_length: 64", "zero: {stage: 2}",
                     "bf16", "bf16", "[]", ", in_backward: true, max_grad_norm: none"},
        LayoutRecipe{"in_backward_zero_3", 2, kDeep,
                     "global_samples: 2, micro_samples: 1, sequence_length: 64", "zero: {stage: 3}",
                     "bf16", "auto", "[]", ", in_backward: true, max_grad_norm: none"},
        LayoutRecipe{"in_backward_untied_bf16_int8", 1, kDeep + ", tie_word_embeddings: false",
                     "global_samples: 1, micro_samples: 1, sequence_length: 64", "data: 1", "bf16",
                     "auto", "[]", ", in_backward: true, max_grad_norm: none, moments: int8"},
        LayoutRecipe{"moments_int8", 2, kWide,
                     "global_samples: 4, micro_samples: 2, sequence_length: 64", "data: 2", "fp32",
                     "auto", "[]", ", moments: int8"},
        LayoutRecipe{"hybrid_offload_all", 4, kDeep,
                     "global_samples: 4, micro_samples: 1, sequence_length: 64",
                     "zero: {stage: 3, shard_size: 2, offload: all}"}),
    [](const auto& recipe) { return std::string(recipe.param.name); });

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
