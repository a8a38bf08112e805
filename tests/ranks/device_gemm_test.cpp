// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// run.gemm on the fake device: when products are measured, that ranks and processes take the same
// algorithms, and that training with them is training.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <mutex>

#include "capstan/base/error.h"
#include "capstan/base/file.h"
#include "capstan/ops/gemm.h"
#include "ranks/engine_fixture.h"
#include "support/fake_device/device_ranks.h"
#include "support/fake_device/fake_device.h"
#include "support/fake_device/fake_lt.h"
#include "support/run_ranks.h"
#include "support/temp_dir.h"

namespace capstan::engine {
namespace {

using test::FakeLt;
using test::FakeLtOptions;
using testing::make_batches;
using testing::TinyRun;

class DeviceGemm : public ::testing::Test {
 protected:
  void SetUp() override { test::install_fake_device(); }
  void TearDown() override { ops::install_lt_api(nullptr); }
};

std::shared_ptr<FakeLt> install(FakeLtOptions options = {}) {
  auto api = std::make_shared<FakeLt>(std::move(options));
  ops::install_lt_api(api);
  return api;
}

TinyRun bf16(std::string gemm, std::vector<std::string> more = {}) {
  more.emplace_back("precision.compute=bf16");
  return {.steps = 5, .overrides = std::move(more), .gemm = std::move(gemm)};
}

struct Trained {
  std::vector<StepReport> reports;  // of rank 0
  std::string hash;                 // checked equal on all ranks
  size_t choices = 0;
};

Trained train_on_device(const TinyRun& run, const std::function<void(int step)>& after = {}) {
  const plan::Plan plan = testing::make_tiny_plan(run);
  Trained out;
  std::mutex mutex;
  const auto on_rank = [&](const comm::Communicator& world) {
    const test::BackwardOnThisThread here;
    mesh::Mesh mesh(world, plan.grid);
    Engine engine(plan, mesh, {.gemm_file = run.gemm_file});
    const auto objective = make_next_token_objective();
    std::vector<StepReport> reports;
    for (int step = 0; step < run.steps; ++step) {
      reports.push_back(engine.step(
          make_batches(plan, plan.grid.data_parallel_index(world.rank()), step), *objective));
      if (after) after(step);
    }
    const std::string hash = engine.weights_hash();
    const std::lock_guard lock(mutex);
    if (!out.hash.empty()) {
      EXPECT_EQ(hash, out.hash);
    }
    out.hash = hash;
    if (world.rank() == 0) out.reports = reports;
    if (const auto gemm = ops::Gemm::shared()) out.choices = gemm->choices().size();
  };
  if (run.ranks == 1)
    test::run_ranks(1, on_rank);
  else
    test::run_device_ranks(run.ranks, on_rank);
  return out;
}

void expect_close(const Trained& a, const Trained& b, double tolerance) {
  ASSERT_EQ(a.reports.size(), b.reports.size());
  for (size_t i = 0; i < a.reports.size(); ++i) {
    EXPECT_NEAR(a.reports[i].loss / b.reports[i].loss, 1, tolerance) << "step " << i;
    EXPECT_NEAR(a.reports[i].grad_norm / b.reports[i].grad_norm, 1, 10 * tolerance);
  }
}

TEST_F(DeviceGemm, TrainingIsThatOfLibTorch) {
  const std::vector<std::vector<std::string>> cases = {
      {},
      {"model.attention_bias=true", "model.tie_word_embeddings=false"},
      {"model.family=gpt2", "model.num_key_value_heads=4"},
      {"parallel.recompute.mode=block"}};
  for (const auto& overrides : cases) {
    const Trained expected = train_on_device(bf16("libtorch", overrides));
    EXPECT_EQ(expected.choices, 0U);
    for (const int algorithms : {1, 3}) {
      const auto api = install({.algorithms = algorithms});
      const Trained got = train_on_device(bf16("cublaslt", overrides));
      expect_close(got, expected, 5e-3);
      EXPECT_GT(api->products(), 100);
      EXPECT_GT(got.choices, 5U);
      EXPECT_EQ(api->last_algorithm(), algorithms - 1) << "the fastest";
    }
  }
}

const std::vector<std::string> kGpt2 = {"model.family=gpt2", "model.num_key_value_heads=4"};
std::vector<std::string> gpt2(std::vector<std::string> more) {
  more.insert(more.begin(), kGpt2.begin(), kGpt2.end());
  return more;
}

// What lies between the two products of a GPT-2 MLP is done by them; only what is made again has
// its derivative apart. Bias gradients come with weight gradients that are not put off.
TEST_F(DeviceGemm, Gpt2HasItsEpilogues) {
  struct Case {
    int ranks;
    bool has_gelu, has_derivative, has_sums;
    std::vector<std::string> overrides;
  };
  const Case cases[] = {
      {1, true, true, true, {}},
      {1, false, false, true, {"model.hidden_act=gelu"}},
      {1,
       true,
       false,
       true,
       {"parallel.recompute.mode=selective", "parallel.recompute.parts=[mlp]"}},
      {1, true, true, true, {"parallel.recompute.mode=block"}},
      {2, true, true, true, {"parallel.tensor=2", "model.intermediate_size=32"}},
      {2,
       true,
       true,
       true,
       {"parallel.tensor=2", "model.intermediate_size=32", "parallel.sequence=true"}},
      {2,
       false,
       false,
       false,
       {"parallel.tensor=2", "parallel.sequence=true", "parallel.sequence_overlap=true"}},
      {2,
       true,
       true,
       false,
       {"parallel.pipeline.schedule=zero_bubble", "parallel.pipeline.size=2",
        "model.tie_word_embeddings=false"}},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.overrides.empty() ? "one rank" : c.overrides.front());
    TinyRun plain = bf16("libtorch", gpt2(c.overrides)),
            fused = bf16("cublaslt", gpt2(c.overrides));
    plain.ranks = fused.ranks = c.ranks;
    const Trained expected = train_on_device(plain);
    const auto api = install();
    expect_close(train_on_device(fused), expected, 5e-3);
    EXPECT_EQ(api->products(ops::LtEpilogue::kGeluBias) > 0, c.has_gelu);
    EXPECT_EQ(api->products(ops::LtEpilogue::kGeluGradient) > 0, c.has_derivative);
    EXPECT_EQ(api->products(ops::LtEpilogue::kBiasGradient) > 0, c.has_sums);
  }
}

// Where the parts are faster, they are what runs.
TEST_F(DeviceGemm, Gpt2TakesPartsThatAreFaster) {
  const auto api = install({.us = [](const auto& problem, int algorithm) {
    return 10.0 - algorithm + (ops::is_fused(problem) ? 5 : 0);
  }});
  int64_t fused_at_first = 0;
  const auto fused = [&api] {
    return api->products(ops::LtEpilogue::kGeluBias) +
           api->products(ops::LtEpilogue::kGeluGradient);
  };
  (void)train_on_device(bf16("cublaslt", kGpt2), [&](int step) {
    if (step == 0) fused_at_first = fused();
  });
  EXPECT_GT(fused_at_first, 0) << "before the measurement";
  EXPECT_EQ(fused(), fused_at_first);
}

TEST_F(DeviceGemm, IsMeasuredBeforeTheSecondStepAndNeverAgain) {
  for (const std::string gemm : {"auto", "cublaslt"}) {
    const auto api = install();
    std::vector<int64_t> timed, products;
    const Trained run = train_on_device(bf16(gemm), [&](int) {
      timed.push_back(api->timed());
      products.push_back(api->products());
    });
    // A first round and three that count, of three algorithms and, where it is a rival, LibTorch.
    const int64_t each = 4 * (gemm == "auto" ? 4 : 3);
    EXPECT_EQ(timed[0], 0);
    EXPECT_EQ(timed[1], static_cast<int64_t>(run.choices) * each);
    EXPECT_EQ(timed.back(), timed[1]);
    EXPECT_EQ(products[0] > 0, gemm == "cublaslt") << "the first step";
    EXPECT_GT(products[1], products[0]);
    EXPECT_EQ(products[3] - products[2], products[4] - products[3]);
  }
}

TEST_F(DeviceGemm, AutoStaysWithLibTorchWhereItIsFaster) {
  const auto api = install({.libtorch_us = 1});
  const Trained run = train_on_device(bf16("auto"));
  EXPECT_GT(run.choices, 5U);
  EXPECT_EQ(api->products(), 0);
  ops::install_lt_api(nullptr);
  EXPECT_EQ(run.hash, train_on_device(bf16("libtorch")).hash);
}

TEST_F(DeviceGemm, AFileGivesTheNextProcessTheSameBits) {
  const test::TempDir folder;
  TinyRun run = bf16("cublaslt");
  run.gemm_file = (folder.path() / "products.txt").string();
  auto api = install();
  const Trained first = train_on_device(run);
  EXPECT_GT(api->timed(), 0);
  std::vector<std::string> hashes;
  // Other times would lead to other choices, if anything were measured.
  for (const double us : {1.0, 2.0}) {
    api = install({.us = [us](const auto&, int i) { return us + i; }});
    const Trained next = train_on_device(run);
    EXPECT_EQ(api->timed(), 0);
    EXPECT_EQ(api->last_algorithm(), 2);
    EXPECT_EQ(next.choices, first.choices);
    hashes.push_back(next.hash);
  }
  EXPECT_EQ(hashes[0], hashes[1]);
}

TEST_F(DeviceGemm, FilesOfOtherGpusAndBrokenOnesAreMeasuredAnew) {
  const test::TempDir folder;
  TinyRun run = bf16("cublaslt");
  run.gemm_file = (folder.path() / "products.txt").string();
  (void)install();
  const Trained first = train_on_device(run);
  const std::string good = read_file(run.gemm_file);
  const auto api = install({.identity = "another"});
  EXPECT_EQ(train_on_device(run).choices, first.choices);
  EXPECT_GT(api->timed(), 0);
  EXPECT_THAT(read_file(run.gemm_file), ::testing::HasSubstr("another"));
  const auto again = install();
  write_file_atomic(run.gemm_file, good.substr(0, good.size() - 9) + "\n");
  EXPECT_EQ(train_on_device(run).hash, first.hash);
  EXPECT_GT(again->timed(), 0);
  EXPECT_EQ(read_file(run.gemm_file), good);
}

TEST_F(DeviceGemm, RanksTakeWhatRankZeroMeasured) {
  for (const std::vector<std::string>& layout :
       {std::vector<std::string>{"parallel.data=2"},
        {"parallel.pipeline.size=2", "model.tie_word_embeddings=false"},
        {"parallel.tensor=2"},
        {"parallel.zero.stage=2"}}) {
    const auto api = install();
    TinyRun run = bf16("cublaslt", layout);
    run.ranks = 2;
    const Trained got = train_on_device(run);
    EXPECT_EQ(api->timed(), static_cast<int64_t>(got.choices) * 4 * 3) << layout.front();
    EXPECT_GT(api->products(), 100);
    TinyRun plain = bf16("libtorch", layout);
    plain.ranks = 2;
    expect_close(got, train_on_device(plain), 5e-3);
  }
}

TEST_F(DeviceGemm, DeterministicRunsMeasureNothing) {
  const auto api = install();
  const TinyRun run = bf16("cublaslt", {"run.deterministic=true"});
  EXPECT_EQ(train_on_device(run).hash, train_on_device(run).hash);
  EXPECT_EQ(api->timed(), 0);
  EXPECT_EQ(api->last_algorithm(), 0);
}

// Launched steps are those run one op at a time. The file spares both the first step without
// choices.
TEST_F(DeviceGemm, GraphsLaunchTheSameAlgorithms) {
  for (const auto& overrides : {std::vector<std::string>{}, kGpt2}) {
    const test::TempDir folder;
    const auto api = install();
    TinyRun run = bf16("cublaslt", overrides);
    run.steps = 6;
    run.gemm_file = (folder.path() / "products.txt").string();
    (void)train_on_device(run);
    const Trained plain = train_on_device(run);
    run.graphs = true;
    const int64_t before = test::graph_launches();
    EXPECT_EQ(train_on_device(run).hash, plain.hash);
    EXPECT_GT(test::graph_launches(), before);
    EXPECT_EQ(api->products(ops::LtEpilogue::kGeluGradient) > 0, !overrides.empty());
  }
}

TEST_F(DeviceGemm, WithoutCublasltAWishIsRefusedAndAutoIsNone) {
  EXPECT_EQ(train_on_device(bf16("auto")).choices, 0U);
  const auto why = [] {
    try {
      (void)train_on_device(bf16("cublaslt"));
    } catch (const std::exception& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_THAT(why(), ::testing::HasSubstr("run.gemm: libtorch"));
}

}  // namespace
}  // namespace capstan::engine
