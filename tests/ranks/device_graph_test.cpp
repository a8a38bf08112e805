// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Steps that are launched as graphs are the steps that are run one op at a time, to the last bit.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <limits>
#include <memory>

#include "capstan/base/error.h"
#include "capstan/device/accelerator.h"
#include "capstan/ops/device_kernels.h"
#include "ranks/engine_fixture.h"
#include "support/fake_device/fake_device.h"
#include "support/fake_device/fake_kernels.h"

namespace capstan::engine {
namespace {

using testing::make_batches;
using testing::TinyResult;
using testing::TinyRun;

constexpr int kSteps = 7;

std::vector<std::vector<std::string>> cases() {
  return {{"run.seed=3"},
          {"data.documents=separate", "model.sliding_window=5"},
          {"model.tie_word_embeddings=false", "model.attention_bias=true"},
          {"precision.compute=bf16"},
          {"parallel.recompute.mode=block"},
          {"optimizer.max_grad_norm=none"},
          {"precision.compute=fp16"},
          {"optimizer.spike_skip={sigma: 6.0, window: 4}"},
          {"model.family=gpt2", "model.num_key_value_heads=4", "data.documents=separate"},
          {"model.frozen=['*', '!*.1.*']"}};
}

std::vector<std::string> in_backward() {
  return {"optimizer.in_backward=true", "optimizer.max_grad_norm=none", "batch.micro_samples=8"};
}

// A block of codes is 256 elements.
const std::vector<std::string> kInt8 = {
    "optimizer.moments=int8",      "precision.compute=fp32",    "model.hidden_size=256",
    "model.intermediate_size=256", "model.num_hidden_layers=1", "model.initializer_range=0.05"};

struct Trained {
  TinyResult run;
  int64_t waits = 0, launches = 0;  // of the last three steps
};

Trained train_by(const TinyRun& run, const testing::TinyHooks& hooks = {}) {
  Trained out;
  testing::with_engines(
      run,
      [&](int rank, Engine& engine) {
        const test::BackwardOnThisThread here;
        const auto objective =
            hooks.objective ? hooks.objective(rank) : make_next_token_objective();
        int64_t waits = 0, launches = 0;
        for (int step = 0; step < kSteps; ++step) {
          if (step == kSteps - 3) waits = test::host_syncs(), launches = test::graph_launches();
          engine.start_step(make_batches(engine.plan(), rank, step), *objective);
          if (engine.unreported_steps() > 1) out.run.reports.push_back(engine.finish_step());
        }
        out.waits = test::host_syncs() - waits;
        out.launches = test::graph_launches() - launches;
        while (engine.unreported_steps() > 0) out.run.reports.push_back(engine.finish_step());
        out.run.weights = testing::copy_weights(engine);
        out.run.hash = engine.weights_hash();
      },
      hooks);
  return out;
}

class DeviceGraph : public ::testing::TestWithParam<bool> {
 public:
  void SetUp() override {
    test::install_fake_device();
    if (GetParam()) ops::install_device_kernels(&test::fake_kernels());
  }
  void TearDown() override { ops::install_device_kernels(nullptr); }
};

// The optimizer's own pass is a third graph, in the steps that have it. Where it comes first when
// the step is recorded already, the step is recorded again.
TEST_P(DeviceGraph, PassesForTheCurvatureAreLaunchedToo) {
  struct Form {
    int interval, launches;  // of the pass in the last three of seven steps
    std::vector<std::string> overrides;
  };
  std::vector<Form> forms = {{1, 3, {"precision.compute=fp16", "precision.loss_scale=128"}},
                             {2, 2, {"data.documents=separate", "precision.compute=bf16"}},
                             {3, 1, {"parallel.recompute.mode=block"}}};
  const auto with_updates = [](std::vector<std::string> overrides) {
    for (const std::string& more : in_backward()) overrides.push_back(more);
    return overrides;
  };
  forms.push_back({2, 2, with_updates({"precision.compute=bf16"})});
  forms.push_back({1, 3, with_updates({"model.tie_word_embeddings=true"})});
  if (GetParam()) {
    forms.push_back({3, 1, {"optimizer.moments=bf16", "precision.compute=bf16"}});
    forms.push_back({2, 2, kInt8});
    forms.push_back({1, 3, with_updates(kInt8)});
  }
  for (Form& form : forms) {
    SCOPED_TRACE(::testing::PrintToString(form.overrides));
    form.overrides.insert(form.overrides.end(),
                          {"optimizer.name=sophia", "optimizer.lr=1.0e-3",
                           "optimizer.sophia.interval=" + std::to_string(form.interval)});
    const Trained plain = train_by({.overrides = form.overrides});
    const Trained graph = train_by({.overrides = form.overrides, .graphs = true});
    testing::expect_same_run(graph.run, plain.run, 0);
    EXPECT_EQ(graph.run.hash, plain.run.hash);
    EXPECT_EQ(graph.launches, 3 * 2 + form.launches);
    EXPECT_EQ(graph.waits, 0) << test::last_host_syncs(graph.waits);
    EXPECT_EQ(plain.waits, 0) << test::last_host_syncs(plain.waits);
  }
}

TEST_P(DeviceGraph, StepsAreThoseWithoutIt) {
  auto all = cases();
  for (const char* more : {"run.seed=4", "precision.compute=bf16", "optimizer.name=lion",
                           "model.tie_word_embeddings=true"}) {
    all.push_back(in_backward());
    all.back().insert(all.back().begin(), more);
  }
  for (const auto& overrides : all) {
    SCOPED_TRACE(overrides.front());
    const Trained plain = train_by({.overrides = overrides});
    const Trained graph = train_by({.overrides = overrides, .graphs = true});
    testing::expect_same_run(graph.run, plain.run, 0);
    EXPECT_EQ(graph.run.hash, plain.run.hash);
    EXPECT_EQ(plain.launches, 0);
    EXPECT_EQ(graph.launches, 3 * 2);  // the passes of all micro-batches, the update
    EXPECT_EQ(graph.waits, 0) << test::last_host_syncs(graph.waits);
  }
}

// A recording takes the memory that the steps before it have left.
TEST_P(DeviceGraph, RecordingTakesNoMemory) {
  testing::with_engines({.graphs = true}, [](int rank, Engine& engine) {
    const test::BackwardOnThisThread here;
    const auto objective = make_next_token_objective();
    std::vector<int64_t> reserved;
    for (int step = 0; step < 5; ++step) {
      (void)engine.step(make_batches(engine.plan(), rank, step), *objective);
      reserved.push_back(device::accelerator()->memory().reserved_bytes);
    }
    EXPECT_EQ(reserved[2], reserved[1]);
    EXPECT_EQ(reserved[4], reserved[1]);
  });
}

// Next token, with other weights in the fifth step.
class SpoiltWeights final : public Objective {
 public:
  explicit SpoiltWeights(double factor, int64_t micro_batches = 4)
      : factor_(factor), micro_batches_(micro_batches) {}
  double local_denominator(const std::vector<MicroBatch>& batches) const override {
    return base_->local_denominator(batches);
  }
  Tensor weights(const MicroBatch& batch, double denominator) const override {
    const bool is_fifth = calls_ / micro_batches_ == 4;
    ++calls_;
    return base_->weights(batch, denominator).mul(is_fifth ? factor_ : 1.0);
  }
  Tensor loss(const nn::TokenScores&, const MicroBatch&, double) const override { return {}; }

 private:
  double factor_;
  int64_t micro_batches_;
  mutable int64_t calls_ = 0;
  std::unique_ptr<Objective> base_ = make_next_token_objective();
};

// The decision is in the graph: a launched step is skipped, the next one is not.
TEST_P(DeviceGraph, LaunchedStepsAreSkipped) {
  struct Spoilt {
    const char* override;
    double factor;
    const char* skipped;
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const Spoilt& spoilt :
       {Spoilt{"run.seed=3", nan, "nonfinite loss"},
        Spoilt{"precision.compute=fp16", nan, "nonfinite loss"},
        Spoilt{"optimizer.spike_skip={sigma: 6.0, window: 4}", 100, "spike"}}) {
    SCOPED_TRACE(spoilt.override);
    const testing::TinyHooks hooks{.hooks = {}, .objective = [&](int) {
                                     return std::make_unique<SpoiltWeights>(spoilt.factor);
                                   }};
    TinyRun run{.overrides = {spoilt.override}};
    const Trained plain = train_by(run, hooks);
    run.graphs = true;
    const Trained graph = train_by(run, hooks);
    EXPECT_EQ(graph.run.reports[4].skipped, spoilt.skipped);
    EXPECT_EQ(graph.run.reports[5].skipped, "");
    EXPECT_EQ(graph.run.reports[6].loss_scale.value_or(32768), 32768);
    testing::expect_same_run(graph.run, plain.run, 0);
  }
}

// What has begun to update blocks cannot be skipped.
TEST_P(DeviceGraph, LaunchedUpdatesInTheBackwardEndWhereTheyAreNotFinite) {
  const testing::TinyHooks hooks{.hooks = {}, .objective = [](int) {
                                   return std::make_unique<SpoiltWeights>(
                                       std::numeric_limits<double>::quiet_NaN(), 1);
                                 }};
  TinyRun run{.overrides = in_backward(), .graphs = true};
  EXPECT_THROW((void)train_by(run, hooks), Error);
}

// Evaluation and a restore between launches read and write the same weights.
TEST_P(DeviceGraph, OtherPassesInBetweenSeeTheSameWeights) {
  const auto losses = [](bool graphs) {
    std::vector<double> made;
    testing::with_engines({.graphs = graphs}, [&](int rank, Engine& engine) {
      const test::BackwardOnThisThread here;
      const auto objective = make_next_token_objective();
      for (int step = 0; step < kSteps; ++step) {
        made.push_back(engine.step(make_batches(engine.plan(), rank, step), *objective).loss);
        engine.evaluate(make_batches(engine.plan(), rank, 100)[0]);
        made.push_back(engine.report_eval().loss());
        if (step != 4) continue;
        for (const auto& entry : engine.state_entries())
          if (entry.kind == "model") entry.tensor.mul_(0.5);
        engine.restore(engine.scalars());
      }
    });
    return made;
  };
  EXPECT_EQ(losses(true), losses(false));
}

// No fallback to ordinary steps.
TEST_P(DeviceGraph, WhatChangesFromStepToStep_IsRefused) {
  class ByLoss final : public Objective {
   public:
    double local_denominator(const std::vector<MicroBatch>&) const override { return 1; }
    Tensor weights(const MicroBatch&, double) const override { return {}; }
    Tensor loss(const nn::TokenScores& scores, const MicroBatch&, double) const override {
      return scores.logprob_BT.sum().neg();
    }
  };
  testing::with_engines({.graphs = true}, [](int rank, Engine& engine) {
    EXPECT_THROW(engine.start_step(make_batches(engine.plan(), rank, 0), ByLoss()), ConfigError);
  });
  EXPECT_THROW(testing::with_engines(
                   {.overrides = {"parallel.zero.stage=1", "parallel.zero.offload=optimizer"},
                    .graphs = true},
                   [](int, Engine&) {}),
               Error);
}

INSTANTIATE_TEST_SUITE_P(Forms, DeviceGraph, ::testing::Bool(),
                         [](const auto& one) { return one.param ? "ByOurKernels" : "ByAten"; });

}  // namespace
}  // namespace capstan::engine
