// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A run on a device is the run on the CPU: the same engine on the fake device, whose memory the
// host cannot touch, whose streams notice a missing wait and which counts how often the host waits.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <limits>
#include <map>
#include <memory>
#include <set>

#include "capstan/base/error.h"
#include "capstan/checkpoint/saver.h"
#include "capstan/device/accelerator.h"
#include "capstan/infer/kv_cache.h"
#include "capstan/ops/device_kernels.h"
#include "ranks/engine_fixture.h"
#include "support/fake_device/fake_device.h"
#include "support/fake_device/fake_kernels.h"
#include "support/run_ranks.h"

namespace capstan::engine {
namespace {

using testing::make_batches;
using testing::TinyResult;
using testing::TinyRun;
using testing::train;

struct Case {
  const char* name;
  std::vector<std::string> overrides;
};
std::vector<Case> cases() {
  const std::string moe = "model.family=moe";
  const std::vector<std::string> experts{moe, "model.experts.count=4", "model.experts.per_token=2",
                                         "model.experts.auxiliary_loss=0.02"};
  const auto with = [&](std::vector<std::string> list) {
    list.insert(list.begin(), experts.begin(), experts.end());
    return list;
  };
  return {
      {"plain", {}},
      {"tied", {"model.tie_word_embeddings=true"}},
      {"untied, biases", {"model.tie_word_embeddings=false", "model.attention_bias=true"}},
      {"biases of q, k, v, norms of heads",
       {"model.attention_bias=true", "model.attention_output_bias=false", "model.qk_norm=true"}},
      {"norms of heads, selective",
       {"model.qk_norm=true", "precision.keep_fp32=['*norm*']", "parallel.recompute.mode=selective",
        "parallel.recompute.parts=[attention, mlp, norm]"}},
      {"window and documents", {"model.sliding_window=5", "data.documents=separate"}},
      {"recompute", {"parallel.recompute.mode=block"}},
      {"selective",
       {"parallel.recompute.mode=selective", "parallel.recompute.parts=[attention, mlp, norm]"}},
      {"activations on the host", {"parallel.offload_activations=true"}},
      {"optimizer on the host", {"parallel.zero.stage=1", "parallel.zero.offload=optimizer"}},
      {"all on the host", {"parallel.zero.stage=3", "parallel.zero.offload=all"}},
      {"frozen", {"model.frozen=['*', '!*.1.*']"}},
      {"kept", {"precision.keep_fp32=['*norm*']"}},
      {"lion", {"optimizer.name=lion"}},
      {"sophia", {"optimizer.name=sophia", "optimizer.sophia.interval=2"}},
      {"gpt2", {"model.family=gpt2", "model.num_key_value_heads=4", "data.documents=separate"}},
      {"gpt2 with erf, selective",
       {"model.family=gpt2", "model.num_key_value_heads=4", "model.hidden_act=gelu",
        "parallel.recompute.mode=selective", "parallel.recompute.parts=[attention, mlp, norm]"}},
      {"experts", experts},
      {"experts by sigmoid",
       with({"model.experts.router=sigmoid", "model.experts.z_loss=0.001",
             "model.experts.bias_update_rate=0.01", "model.experts.auxiliary_scope=global"})},
      {"experts of a capacity", with({"model.experts.capacity_factor=1.0"})},
  };
}

// LibTorch starts a thread per device for its backward at the first one of the process, which was
// on the CPU: ranks do theirs on their own thread.
testing::TinyHooks on_own_thread() {
  return {.hooks =
              [](int) {
                thread_local const test::BackwardOnThisThread here;
                return EngineHooks{};
              },
          .objective = {}};
}

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// Gradients of the given steps (from 0) are multiplied.
testing::TinyHooks poison(std::set<int> steps, double factor, bool own_thread) {
  testing::TinyHooks hooks;
  hooks.hooks = [=](int rank) {
    EngineHooks made = own_thread ? on_own_thread().hooks(rank) : EngineHooks{};
    made.before_reduce = [=, step = -1](int bucket, const Tensor& gradients) mutable {
      if (bucket == 0) ++step;
      if (bucket == 1 && steps.contains(step)) gradients.mul_(factor);
    };
    return made;
  };
  return hooks;
}

// Next token, but the loss of the third step's four micro-batches is no number; gradients are.
class PoisonedLoss final : public Objective {
 public:
  double local_denominator(const std::vector<MicroBatch>& batches) const override {
    return base_->local_denominator(batches);
  }
  Tensor weights(const MicroBatch&, double) const override { return {}; }
  Tensor loss(const nn::TokenScores& scores, const MicroBatch& batch,
              double denominator) const override {
    const int64_t call = calls_++;
    return base_->loss(scores, batch, denominator).add(call >= 8 && call < 12 ? kNan : 0.0);
  }

 private:
  mutable int64_t calls_ = 0;
  std::unique_ptr<Objective> base_ = make_next_token_objective();
};

struct Spoilt {
  const char* name;
  TinyRun run;
  int updates;  // that are applied
  std::function<testing::TinyHooks(bool own_thread)> hooks;
};
std::vector<Spoilt> spoilt_runs() {
  const auto gradients = [](std::set<int> steps, double factor) {
    return [=](bool own) { return poison(steps, factor, own); };
  };
  const auto losses = [](bool own) {
    testing::TinyHooks hooks = poison({}, 1, own);
    hooks.objective = [](int) { return std::make_unique<PoisonedLoss>(); };
    return hooks;
  };
  const double huge = 1e200;  // finite, its square is not
  return {
      {"clean", {.steps = 5}, 5, gradients({}, 1)},
      {"unclipped",
       {.steps = 5, .overrides = {"optimizer.max_grad_norm=none"}},
       5,
       gradients({}, 1)},
      {"below the limit",
       {.steps = 5, .overrides = {"optimizer.max_grad_norm=1000"}},
       5,
       gradients({}, 1)},
      {"NaN gradient", {.steps = 5}, 4, gradients({2}, kNan)},
      {"NaN loss", {.steps = 5}, 4, losses},
      {"first and last", {.steps = 5}, 3, gradients({0, 4}, kNan)},
      {"squares that overflow", {.steps = 5}, 4, gradients({1}, huge)},
      {"spike",
       {.steps = 14, .overrides = {"optimizer.spike_skip={sigma: 6.0, window: 16}"}},
       13,
       gradients({12}, 1e6)},
      {"spikes of a short window",
       {.steps = 9,
        .overrides = {"optimizer.spike_skip={sigma: 8.0, window: 4}",
                      "optimizer.max_grad_norm=none"}},
       6,
       gradients({2, 4, 7}, 1e6)},
  };
}

struct Evaluated {
  TinyResult run;
  double loss = 0;
  Tensor logits, cached_logits;
};

Evaluated evaluate(const TinyRun& run) {
  Evaluated out{.run = train(run, on_own_thread())};
  testing::with_engines(
      run,
      [&](int rank, Engine& engine) {
        for (const MicroBatch& batch : make_batches(engine.plan(), rank, 3)) engine.evaluate(batch);
        out.loss = engine.report_eval().loss();
        const auto& shape = engine.plan().model().shape;
        const Tensor ids = at::arange(9, at::kLong).unsqueeze(0);
        out.logits = engine.next_logits(ids, nullptr).cpu();
        infer::ContiguousKvCache cache(static_cast<int>(shape.num_hidden_layers), 12);
        (void)engine.next_logits(ids.narrow(1, 0, 8), &cache);
        out.cached_logits = engine.next_logits(ids.narrow(1, 8, 1), &cache).cpu();
      },
      on_own_thread());
  return out;
}

std::vector<std::vector<std::string>> narrow_runs() {
  return {
      {"optimizer.moments=bf16", "precision.compute=bf16"},
      {"optimizer.moments=int8", "precision.compute=fp32", "model.hidden_size=256",
       "model.intermediate_size=256", "model.num_hidden_layers=1", "model.initializer_range=0.05"},
      {"optimizer.name=sophia", "optimizer.sophia.interval=1", "optimizer.moments=bf16",
       "precision.compute=bf16"},
      {"optimizer.sophia.interval=1", "optimizer.name=sophia", "optimizer.moments=int8",
       "precision.compute=fp32", "model.hidden_size=256", "model.intermediate_size=256",
       "model.num_hidden_layers=1", "model.initializer_range=0.05"}};
}

// What the CPU gives, before there is a device: a process has one.
class OnTheCpu : public ::testing::Environment {
 public:
  static std::map<std::string, Evaluated>& results() {
    static std::map<std::string, Evaluated> of_case;
    return of_case;
  }
  static std::map<std::string, TinyResult>& spoilt() {
    static std::map<std::string, TinyResult> of_run;
    return of_run;
  }
  static std::map<std::string, TinyResult>& narrow_moments() {
    static std::map<std::string, TinyResult> of_moments;
    return of_moments;
  }
  static TinyResult& narrow() {
    static TinyResult result;
    return result;
  }
  void SetUp() override {
    for (const Case& c : cases()) results()[c.name] = evaluate({.overrides = c.overrides});
    for (const Spoilt& s : spoilt_runs()) spoilt()[s.name] = train(s.run, s.hooks(false));
    narrow() = train({.overrides = {"precision.compute=bf16"}});
    for (const auto& overrides : narrow_runs())
      narrow_moments()[overrides[0]] = train({.overrides = overrides});
    test::install_fake_device();
  }
};
const auto* const on_the_cpu = ::testing::AddGlobalTestEnvironment(new OnTheCpu);

class OnADevice : public ::testing::TestWithParam<Case> {};

TEST_P(OnADevice, TheRunIsThatOfTheCpu) {
  const Evaluated& expected = OnTheCpu::results().at(GetParam().name);
  const Evaluated got = evaluate({.overrides = GetParam().overrides});
  testing::expect_same_run(got.run, expected.run, 1e-10);
  EXPECT_NEAR(got.loss, expected.loss, 1e-10);
  EXPECT_LE((got.logits - expected.logits).abs().max().item<double>(), 1e-10);
  EXPECT_LE((got.cached_logits - expected.cached_logits).abs().max().item<double>(), 1e-10);
}

// Our kernels, run by the emulator, in the place of ATen's.
TEST_P(OnADevice, TheRunByOurKernelsToo) {
  ops::install_device_kernels(&test::fake_kernels());
  const Evaluated& expected = OnTheCpu::results().at(GetParam().name);
  const Evaluated got = evaluate({.overrides = GetParam().overrides});
  ops::install_device_kernels(nullptr);
  testing::expect_same_run(got.run, expected.run, 1e-10);
  EXPECT_NEAR(got.loss, expected.loss, 1e-10);
  EXPECT_LE((got.logits - expected.logits).abs().max().item<double>(), 1e-10);
  EXPECT_LE((got.cached_logits - expected.cached_logits).abs().max().item<double>(), 1e-10);
}

INSTANTIATE_TEST_SUITE_P(Runs, OnADevice, ::testing::ValuesIn(cases()), [](const auto& one) {
  std::string name = one.param.name;
  std::replace_if(
      name.begin(), name.end(), [](char c) { return !std::isalnum(c); }, '_');
  return name;
});

TEST(Device, Bf16_StaysCloseToTheCpu) {
  const TinyResult got = train({.overrides = {"precision.compute=bf16"}}, on_own_thread());
  for (size_t i = 0; i < got.reports.size(); ++i) {
    EXPECT_NEAR(got.reports[i].loss / OnTheCpu::narrow().reports[i].loss, 1, 5e-3);
    EXPECT_NEAR(got.reports[i].grad_norm / OnTheCpu::narrow().reports[i].grad_norm, 1, 3e-2);
  }
}

// Types of runs of users: fp32 weights beside bf16 values, narrow moments, all on the device.
TEST(Device, NarrowMoments_RunByOurKernels) {
  ops::install_device_kernels(&test::fake_kernels());
  for (const auto& overrides : narrow_runs()) {
    const TinyResult got = train({.overrides = overrides}, on_own_thread());
    const TinyResult& want = OnTheCpu::narrow_moments().at(overrides[0]);
    for (size_t i = 0; i < got.reports.size(); ++i)
      EXPECT_NEAR(got.reports[i].loss / want.reports[i].loss, 1, 5e-3) << overrides[0];
  }
  ops::install_device_kernels(nullptr);
}

// Steps that are queued ahead of their reports; afterwards those of the ordinary run must have
// come.
std::vector<StepReport> train_ahead(
    Engine& engine, int rank, int steps,
    const std::unique_ptr<Objective>& objective = make_next_token_objective()) {
  std::vector<StepReport> reports;
  for (int step = 0; step < steps; ++step) {
    engine.start_step(make_batches(engine.plan(), rank, step), *objective);
    if (engine.unreported_steps() > 1) reports.push_back(engine.finish_step());
  }
  while (engine.unreported_steps() > 0) reports.push_back(engine.finish_step());
  return reports;
}

void expect_no_waits(const TinyRun& run) {
  testing::with_engines(
      run,
      [](int rank, Engine& engine) {
        ASSERT_TRUE(engine.reports_late());
        (void)train_ahead(engine, rank, 2);
        const int64_t before = test::host_syncs();
        (void)train_ahead(engine, rank, 4);
        const int64_t waits = test::host_syncs() - before;
        EXPECT_EQ(waits, 0) << test::last_host_syncs(waits);
      },
      on_own_thread());
}

TEST(Device, TheHostNeverWaitsInAStep) {
  for (const char* more :
       {"optimizer.max_grad_norm=1.0", "data.documents=separate", "precision.compute=bf16",
        "parallel.recompute.mode=block", "optimizer.name=lion", "optimizer.name=sophia",
        "precision.compute=fp16", "optimizer.spike_skip={sigma: 6.0, window: 4}"}) {
    SCOPED_TRACE(more);
    expect_no_waits({.overrides = {more}});
    ops::install_device_kernels(&test::fake_kernels());
    expect_no_waits({.overrides = {more}});
    ops::install_device_kernels(nullptr);
  }
  ops::install_device_kernels(&test::fake_kernels());
  for (const auto& overrides : narrow_runs()) expect_no_waits({.overrides = overrides});
  ops::install_device_kernels(nullptr);
}

void expect_reports_late(const std::vector<std::string>& overrides, bool late) {
  testing::with_engines(
      {.overrides = overrides},
      [&](int rank, Engine& engine) {
        EXPECT_EQ(engine.reports_late(), late) << overrides.front();
        engine.start_step(make_batches(engine.plan(), rank, 0), *make_next_token_objective());
        EXPECT_EQ(engine.unreported_steps(), 1);
        EXPECT_EQ(engine.finish_step().step, 1);
      },
      on_own_thread());
}

TEST(Device, WhatTheHostDecides_IsKnownFromTheRecipe) {
  expect_reports_late({"run.seed=1"}, true);
  expect_reports_late({"optimizer.spike_skip={sigma: 6.0, window: 16}"}, true);
  expect_reports_late({"precision.compute=fp16"}, true);
  expect_reports_late({"precision.compute=fp16", "precision.loss_scale=128"}, true);
  expect_reports_late({"parallel.zero.stage=1", "parallel.zero.offload=optimizer"}, false);
  expect_reports_late({"model.family=moe", "model.experts.count=4"}, true);
  expect_reports_late({"model.family=moe", "model.experts.count=4", "precision.compute=fp16",
                       "model.experts.z_loss=0.001"},
                      false);
}

// Skipped steps, decided on the device, against the CPU's.
class SkippedOnADevice : public ::testing::TestWithParam<bool> {
 public:
  void SetUp() override {
    if (GetParam()) ops::install_device_kernels(&test::fake_kernels());
  }
  void TearDown() override { ops::install_device_kernels(nullptr); }
};

TEST_P(SkippedOnADevice, StepsAreThoseOfTheCpu) {
  for (const Spoilt& spoilt : spoilt_runs()) {
    SCOPED_TRACE(spoilt.name);
    const TinyResult& expected = OnTheCpu::spoilt().at(spoilt.name);
    testing::expect_same_run(train(spoilt.run, spoilt.hooks(true)), expected, 1e-10);
    TinyResult ahead;
    testing::with_engines(
        spoilt.run,
        [&](int rank, Engine& engine) {
          const auto hooks = spoilt.hooks(true);
          ahead.reports =
              train_ahead(engine, rank, spoilt.run.steps,
                          hooks.objective ? hooks.objective(rank) : make_next_token_objective());
          ahead.weights = testing::copy_weights(engine);
          EXPECT_EQ(engine.scalars().optimizer_count, spoilt.updates);
        },
        spoilt.hooks(true));
    testing::expect_same_run(ahead, expected, 1e-10);
  }
}
INSTANTIATE_TEST_SUITE_P(Forms, SkippedOnADevice, ::testing::Bool(),
                         [](const auto& one) { return one.param ? "ByOurKernels" : "ByAten"; });

TEST_P(SkippedOnADevice, AStepWithoutTargetsIsSkipped) {
  testing::with_engines(
      {},
      [](int rank, Engine& engine) {
        auto batches = make_batches(engine.plan(), rank, 0);
        for (auto& batch : batches) batch.targets_BT.fill_(-100);
        const std::string before = engine.weights_hash();
        EXPECT_EQ(engine.step(batches, *make_next_token_objective()).skipped, "no target tokens");
        EXPECT_EQ(engine.weights_hash(), before);
      },
      on_own_thread());
}

// The limit is noticed one step late at most.
TEST(Device, LimitOfSkippedSteps_EndsTheRun) {
  testing::with_engines(
      {.overrides = {"optimizer.nonfinite_limit=2"}},
      [](int rank, Engine& engine) {
        EXPECT_THROW((void)train_ahead(engine, rank, 9), DivergenceError);
        EXPECT_LE(engine.unreported_steps(), 1);
      },
      poison({2, 3}, kNan, true));
}

TEST(Device, ScalarsOfAStepOnItsWay_AreRefused) {
  testing::with_engines(
      {},
      [](int rank, Engine& engine) {
        const auto objective = make_next_token_objective();
        engine.start_step(make_batches(engine.plan(), rank, 0), *objective);
        EXPECT_THROW((void)engine.scalars(), InternalError);
        EXPECT_THROW((void)engine.step(make_batches(engine.plan(), rank, 1), *objective),
                     InternalError);
        (void)engine.finish_step();
        EXPECT_EQ(engine.scalars().step, 1);
        EXPECT_THROW((void)engine.finish_step(), InternalError);
      },
      on_own_thread());
}

TEST(Device, Ids_AreCheckedBeforeTheyAreThere) {
  testing::with_engines(
      {},
      [](int rank, Engine& engine) {
        auto batches = make_batches(engine.plan(), rank, 0);
        batches[0].ids_BT[0][2] = 4711;
        const auto objective = make_next_token_objective();
        EXPECT_THROW((void)engine.step(batches, *objective), DataError);
      },
      on_own_thread());
}

// A checkpoint of a device goes through the host and comes back.
TEST(Device, State_TravelsThroughTheHost) {
  testing::with_engines(
      {},
      [](int rank, Engine& engine) {
        const auto objective = make_next_token_objective();
        (void)engine.step(make_batches(engine.plan(), rank, 0), *objective);
        const std::string hash = engine.weights_hash();
        const checkpoint::HostState state(engine.state_entries());
        std::vector<std::vector<std::byte>> saved;
        for (const auto& blob : state.blobs())
          saved.emplace_back(blob.bytes.begin(), blob.bytes.end());
        (void)engine.step(make_batches(engine.plan(), rank, 1), *objective);
        EXPECT_NE(engine.weights_hash(), hash);
        const auto blobs = state.blobs();
        for (size_t i = 0; i < saved.size(); ++i)
          EXPECT_TRUE(std::equal(saved[i].begin(), saved[i].end(), blobs[i].bytes.begin()));
        state.write_back();
        engine.restore(engine.scalars());
        EXPECT_EQ(engine.weights_hash(), hash);
      },
      on_own_thread());
}

}  // namespace
}  // namespace capstan::engine
