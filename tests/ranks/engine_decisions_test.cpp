// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Steps that are not applied, and state that is saved and restored: alike on all ranks.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <limits>
#include <set>

#include "capstan/base/error.h"
#include "capstan/comm/threads.h"
#include "ranks/engine_fixture.h"

namespace capstan::engine {
namespace {

using testing::make_batches;
using testing::TinyHooks;
using testing::TinyRun;
using testing::train;
using testing::with_engines;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// Gradients of the given steps (from 0) are multiplied on one rank, before they are summed.
TinyHooks scale_gradients(int on_rank, std::set<int> steps, double factor) {
  TinyHooks hooks;
  hooks.hooks = [=](int rank) {
    EngineHooks h;
    auto step = std::make_shared<int>(-1);
    h.before_reduce = [=](int bucket, const Tensor& gradients) {
      if (bucket == 0) ++*step;
      if (rank == on_rank && bucket == 1 && steps.contains(*step)) gradients.mul_(factor);
    };
    return h;
  };
  return hooks;
}

// Next token, but the weights of one rank's step are not numbers.
class PoisonedLoss final : public Objective {
 public:
  PoisonedLoss(bool poison, int64_t step, int64_t micro_batches)
      : poison_(poison), first_(step * micro_batches), end_(first_ + micro_batches) {}
  double local_denominator(const std::vector<MicroBatch>& batches) const override {
    return base_->local_denominator(batches);
  }
  Tensor weights(const MicroBatch& batch, double denominator) const override {
    const bool here = poison_ && calls_ >= first_ && calls_ < end_;
    ++calls_;
    const Tensor weights_BT = base_->weights(batch, denominator);
    return here ? weights_BT.mul(kNan) : weights_BT;
  }
  Tensor loss(const nn::TokenScores&, const MicroBatch&, double) const override { return {}; }

 private:
  bool poison_;
  int64_t first_, end_;
  mutable int64_t calls_ = 0;
  std::unique_ptr<Objective> base_ = make_next_token_objective();
};

TEST(EngineDecisions, NonFiniteLossOnOneRank_IsSkippedByAll) {
  const auto clean = train({.ranks = 2, .steps = 2});
  TinyHooks hooks;
  hooks.objective = [](int rank) { return std::make_unique<PoisonedLoss>(rank == 1, 1, 2); };
  const auto two = train({.ranks = 2, .steps = 2}, hooks);
  EXPECT_EQ(two.reports[0].skipped, "");
  EXPECT_EQ(two.reports[1].skipped, "nonfinite loss");
  EXPECT_FALSE(std::isfinite(two.reports[1].loss));
  EXPECT_EQ(two.reports[1].lr, clean.reports[1].lr);
  EXPECT_EQ(two.hash, train({.ranks = 2, .steps = 1}).hash);
  EXPECT_NE(two.hash, clean.hash);
}

TEST(EngineDecisions, NonFiniteGradientOnOneRank_IsSkippedByAll) {
  for (const double factor : {kNan, std::numeric_limits<double>::infinity()}) {
    const auto run = train({.ranks = 4, .steps = 2}, scale_gradients(3, {1}, factor));
    EXPECT_EQ(run.reports[1].skipped, "nonfinite gradient");
    EXPECT_EQ(run.hash, train({.ranks = 4, .steps = 1}).hash);
  }
}

TEST(EngineDecisions, NonFiniteSumOnOneRank_IsSkippedByAll) {
  TinyHooks hooks;  // memory that went bad on a rank which counts nothing in the norm
  hooks.hooks = [](int rank) {
    EngineHooks h;
    if (rank == 1)
      h.after_reduce = [](int bucket, const Tensor& gradients) {
        if (bucket == 2) gradients[0].fill_(kNan);
      };
    return h;
  };
  EXPECT_EQ(train({.ranks = 2, .steps = 1}, hooks).reports[0].skipped, "nonfinite gradient");
}

TEST(EngineDecisions, SkippedStep_AdvancesProgressButNotTheUpdateCount) {
  with_engines(
      {.ranks = 2},
      [](int rank, Engine& engine) {
        const auto objective = make_next_token_objective();
        for (int64_t step = 0; step < 3; ++step)
          (void)engine.step(make_batches(engine.plan(), rank, step), *objective);
        const auto s = engine.scalars();
        EXPECT_EQ(s.step, 3);
        EXPECT_EQ(s.optimizer_count, 2);
        EXPECT_EQ(s.samples, 24);
        EXPECT_EQ(s.tokens, 24 * 12);
        EXPECT_EQ(s.skipped_total, 1);
        EXPECT_EQ(s.nonfinite_in_row, 0);
      },
      scale_gradients(0, {1}, kNan));
}

TEST(EngineDecisions, LimitOfSkippedStepsInARow_EndsTheRunWith93) {
  const TinyRun run{.ranks = 2, .steps = 9, .overrides = {"optimizer.nonfinite_limit=3"}};
  try {
    (void)train(run, scale_gradients(1, {1, 3, 4, 5}, kNan));
    FAIL() << "the run went on";
  } catch (const comm::RankError& e) {
    EXPECT_EQ(e.run_exit_code(), 93);
    EXPECT_NE(std::string(e.what()).find("optimizer.nonfinite_limit 3"), std::string::npos);
    EXPECT_NE(std::string(e.what()).find("step 6"), std::string::npos) << e.what();
  }
}

TEST(EngineDecisions, Spike_IsSkippedAndTrainingGoesOn) {
  const TinyRun run{
      .ranks = 2, .steps = 14, .overrides = {"optimizer.spike_skip={sigma: 6.0, window: 16}"}};
  const auto result = train(run, scale_gradients(1, {12}, 1e6));
  for (size_t i = 0; i < result.reports.size(); ++i)
    EXPECT_EQ(result.reports[i].skipped, i == 12 ? "spike" : "") << i;
}

TEST(EngineDecisions, StepWithoutTargets_IsSkipped) {
  with_engines({.ranks = 2}, [](int rank, Engine& engine) {
    const auto objective = make_next_token_objective();
    auto batches = make_batches(engine.plan(), rank, 0);
    for (auto& batch : batches) batch.targets_BT.fill_(-100);
    const std::string before = engine.weights_hash();
    const auto report = engine.step(batches, *objective);
    EXPECT_EQ(report.skipped, "no target tokens");
    EXPECT_EQ(report.loss, 0);
    EXPECT_EQ(engine.weights_hash(), before);
  });
}

TEST(EngineDecisions, LossScale_HalvesOnOverflowAndLeavesTheNormAlone) {
  const TinyRun run{.ranks = 2, .overrides = {"precision.compute=fp16"}};
  const auto clean = train(run);
  EXPECT_EQ(clean.reports[3].loss_scale, 65536.0);
  const auto run2 = train(run, scale_gradients(1, {0}, kNan));
  EXPECT_EQ(run2.reports[0].skipped, "nonfinite gradient");
  EXPECT_EQ(run2.reports[0].loss_scale, 65536.0);
  EXPECT_EQ(run2.reports[1].loss_scale, 32768.0);
  const auto fixed =
      train({.ranks = 2, .overrides = {"precision.compute=fp16", "precision.loss_scale=128"}});
  EXPECT_EQ(fixed.reports[0].loss_scale, 128.0);
  EXPECT_NEAR(fixed.reports[0].grad_norm / clean.reports[0].grad_norm, 1, 2e-2);
  EXPECT_FALSE(train({.steps = 1}).reports[0].loss_scale.has_value());
}

// What a checkpoint would hold, per rank.
struct Saved {
  std::vector<std::pair<std::string, Tensor>> tensors;
  EngineScalars scalars;
};

Saved save(Engine& engine) {
  Saved saved{{}, engine.scalars()};
  for (const auto& e : engine.state_entries())
    saved.tensors.emplace_back(e.kind + "/" + e.name, e.tensor.clone());
  return saved;
}

void load(Engine& engine, const Saved& saved) {
  const auto entries = engine.state_entries();
  ASSERT_EQ(entries.size(), saved.tensors.size());
  for (size_t i = 0; i < entries.size(); ++i) entries[i].tensor.copy_(saved.tensors[i].second);
  engine.restore(saved.scalars);
}

TEST(EngineDecisions, RestoredRun_ContinuesBitForBit) {
  for (const char* compute : {"fp64", "bf16", "fp16"}) {
    const TinyRun run{.ranks = 2,
                      .overrides = {std::string("precision.compute=") + compute,
                                    "optimizer.spike_skip={sigma: 6.0, window: 4}"}};
    const auto whole = train(run);
    std::vector<Saved> saved(2);
    const auto steps = [](Engine& engine, int rank, int64_t from, int64_t to) {
      const auto objective = make_next_token_objective();
      for (int64_t s = from; s < to; ++s)
        (void)engine.step(make_batches(engine.plan(), rank, s), *objective);
    };
    with_engines(run, [&](int rank, Engine& engine) {
      steps(engine, rank, 0, 2);
      saved[static_cast<size_t>(rank)] = save(engine);
    });
    with_engines(run, [&](int rank, Engine& engine) {
      load(engine, saved[static_cast<size_t>(rank)]);
      steps(engine, rank, 2, 4);
      EXPECT_EQ(engine.weights_hash(), whole.hash) << compute;
      EXPECT_EQ(engine.scalars().spike_losses.size(), 4U);
    });
  }
}

TEST(EngineDecisions, StateEntries_AreWrittenOnceAndByAllRanks) {
  std::vector<std::map<std::string, int>> writes(4);
  with_engines({.ranks = 4}, [&](int rank, Engine& engine) {
    for (const auto& e : engine.state_entries()) {
      EXPECT_EQ(e.tensor.numel(), e.box.numel());
      EXPECT_EQ(e.model, "policy");
      writes[static_cast<size_t>(rank)][e.kind + "/" + e.name] += e.writes ? 1 : 0;
    }
  });
  EXPECT_EQ(writes[0].size(), 3 * (1 + 2 * 9 + 1U));
  for (const auto& [name, count] : writes[0])
    EXPECT_EQ(count + writes[1][name] + writes[2][name] + writes[3][name], 1) << name;
  for (const auto& of_rank : writes) {
    int count = 0;
    for (const auto& [name, n] : of_rank) count += n;
    EXPECT_GT(count, 5);
  }
}

TEST(EngineDecisions, ReplicasThatDiffer_AreFoundByTheHash) {
  const auto spoil = [](int rank, Engine& engine) {
    if (rank == 1) engine.state_entries()[3].tensor[0].add_(1e-9);
    (void)engine.weights_hash();
  };
  try {
    with_engines({.ranks = 2}, spoil);
    FAIL() << "two different replicas have one hash";
  } catch (const comm::RankError& e) {
    EXPECT_NE(std::string(e.what()).find("data-parallel ranks"), std::string::npos) << e.what();
  }
}

TEST(EngineDecisions, RanksRestoredFromDifferentSteps_AreRefused) {
  EXPECT_THROW(with_engines({.ranks = 2},
                            [](int rank, Engine& engine) {
                              EngineScalars scalars;
                              scalars.step = rank;
                              engine.restore(scalars);
                            }),
               comm::RankError);
}

TEST(EngineDecisions, BatchesThatDoNotFitThePlan_AreNamed) {
  with_engines({}, [](int, Engine& engine) {
    const auto objective = make_next_token_objective();
    auto batches = make_batches(engine.plan(), 0, 0);
    const auto message = [&] {
      try {
        (void)engine.step(batches, *objective);
      } catch (const ConfigError& e) {
        return std::string(e.what());
      }
      return std::string();
    };
    batches[2].targets_BT = batches[2].targets_BT.narrow(1, 0, 5);
    EXPECT_NE(message().find("targets of micro-batch 2"), std::string::npos) << message();
    EXPECT_NE(message().find("[2, 5]"), std::string::npos) << message();
    batches.pop_back();
    EXPECT_NE(message().find("3 micro-batches"), std::string::npos) << message();
    EXPECT_NO_THROW((void)engine.step(make_batches(engine.plan(), 0, 0), *objective));
  });
}

}  // namespace
}  // namespace capstan::engine
