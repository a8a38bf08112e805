// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// One recipe is one run, whatever the ranks; gradients are summed while backward goes on.
#include "capstan/engine/engine.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "capstan/comm/ledger.h"
#include "capstan/device/allocator.h"
#include "ranks/engine_fixture.h"
#include "support/run_ranks.h"

namespace capstan::engine {
namespace {

using testing::make_batches;
using testing::TinyResult;
using testing::TinyRun;
using testing::train;

TEST(Engine, RanksTimesMicroBatches_GiveTheSameRunInFp64) {
  for (const char* tied : {"true", "false"}) {
    const std::vector<std::string> overrides{std::string("model.tie_word_embeddings=") + tied};
    const TinyResult one = train({.ranks = 1, .overrides = overrides});
    EXPECT_GT(one.reports[1].grad_norm, 1.0) << "clipping is not exercised";
    for (const int ranks : {2, 4}) {
      SCOPED_TRACE(std::string(tied) + " x " + std::to_string(ranks));
      testing::expect_same_run(train({.ranks = ranks, .overrides = overrides}), one, 1e-12);
    }
  }
}

TEST(Engine, BucketSize_ChangesNoBit) {
  const TinyResult small = train({.ranks = 2, .bucket_bytes = 1});
  const TinyResult large = train({.ranks = 2, .bucket_bytes = 1 << 20});
  EXPECT_EQ(small.hash, large.hash);
}

TEST(Engine, RepeatedRun_GivesTheSameBits) {
  EXPECT_EQ(train({.ranks = 4}).hash, train({.ranks = 4}).hash);
}

TEST(Engine, Fp32_TwoRanksStayCloseToOne) {
  const std::vector<std::string> overrides{"precision.compute=fp32"};
  testing::expect_same_run(train({.ranks = 2, .overrides = overrides}),
                           train({.ranks = 1, .overrides = overrides}), 5e-5);
}

TEST(Engine, NarrowCompute_StaysCloseToFp32) {
  const TinyResult wide = train({.overrides = {"precision.compute=fp32"}});
  for (const char* compute : {"bf16", "fp16"}) {
    const TinyResult narrow = train({.overrides = {std::string("precision.compute=") + compute}});
    for (size_t i = 0; i < wide.reports.size(); ++i) {
      EXPECT_EQ(narrow.reports[i].skipped, "") << compute;
      EXPECT_NEAR(narrow.reports[i].loss / wide.reports[i].loss, 1, 2e-2) << compute << i;
      EXPECT_NEAR(narrow.reports[i].grad_norm / wide.reports[i].grad_norm, 1, 0.1) << compute << i;
    }
  }
}

TEST(Engine, InitialWeights_AreTheSameForEveryLayout) {
  const std::string one = train({.ranks = 1, .steps = 0}).hash;
  EXPECT_EQ(train({.ranks = 4, .steps = 0}).hash, one);
  EXPECT_NE(train({.steps = 0, .overrides = {"run.seed=5"}}).hash, one);
}

TEST(Engine, LossOfTheFirstStep_IsNearUniform) {
  const auto run = train({.steps = 1, .overrides = {"model.initializer_range=0.001"}});
  EXPECT_NEAR(run.reports[0].loss, std::log(61.0), 1e-3);
}

TEST(Engine, TinyBatch_IsLearntByHeart) {
  testing::with_engines({.overrides = {"precision.compute=fp32", "optimizer.weight_decay=0.0",
                                       "lr_schedule.kind=constant"}},
                        [](int, Engine& engine) {
                          const auto objective = make_next_token_objective();
                          const auto batches = make_batches(engine.plan(), 0, 0);
                          double loss = 0;
                          for (int i = 0; i < 150; ++i)
                            loss = engine.step(batches, *objective).loss;
                          EXPECT_LT(loss, 0.05);
                        });
}

// Clipping, the loss scale and the norm against the gradients as they lie in the buffers.
TEST(Engine, FirstMoment_IsTheClippedGradient) {
  for (const char* compute : {"fp64", "fp16"}) {
    double squares = 0;
    testing::TinyHooks hooks;
    hooks.hooks = [&](int) {
      EngineHooks h;
      h.after_reduce = [&](int, const Tensor& gradients) {
        squares += gradients.to(at::kDouble).square().sum().item<double>();
      };
      return h;
    };
    const auto check = [&](int, Engine& engine) {
      const auto objective = make_next_token_objective();
      const auto report = engine.step(make_batches(engine.plan(), 0, 0), *objective);
      const double norm = std::sqrt(squares) / report.loss_scale.value_or(1);
      EXPECT_NEAR(report.grad_norm / norm, 1, 1e-13);
      EXPECT_GT(norm, 1.0);
      double moments = 0;
      for (const auto& e : engine.state_entries())
        if (e.kind == "optimizer.exp_avg")
          moments += e.tensor.to(at::kDouble).square().sum().item<double>();
      // beta1 = 0.9, max_grad_norm = 1
      EXPECT_NEAR(std::sqrt(moments) / 0.1, 1, 2e-6) << compute;
    };
    testing::with_engines({.overrides = {std::string("precision.compute=") + compute}}, check,
                          hooks);
  }
}

TEST(Engine, FirstBucketIsReduced_BeforeTheLastBackwardBegins) {
  for (const char* tied : {"true", "false"}) {
    std::vector<std::pair<std::string, int>> events;
    testing::TinyHooks hooks;
    hooks.hooks = [&](int rank) {
      EngineHooks h;
      if (rank == 0)
        h.trace = [&](const char* what, int index) { events.emplace_back(what, index); };
      return h;
    };
    (void)train(
        {.ranks = 2, .steps = 1, .overrides = {std::string("model.tie_word_embeddings=") + tied}},
        hooks);
    const auto place = [&](const char* what, int index, int nth) {
      for (size_t i = 0; i < events.size(); ++i)
        if (events[i] == std::pair<std::string, int>(what, index) && nth-- == 0)
          return static_cast<int>(i);
      return -1;
    };
    // Two micro-batches per rank, blocks 0 to 3, one bucket per block.
    const int last_backward_of_head = place("backward", 3, 1);
    const int last_backward = place("backward", 0, 1);
    ASSERT_GE(last_backward, 0);
    EXPECT_GT(place("reduce", 0, 0), last_backward_of_head);
    EXPECT_LT(place("reduce", 0, 0), last_backward);
    EXPECT_EQ(place("reduce", 0, 1), -1) << "a bucket is reduced once a step";
    EXPECT_LT(place("reduce", 0, 0), place("reduce", 1, 0));
    EXPECT_LT(place("reduce", 2, 0), last_backward);
    EXPECT_EQ(place("reduce", 3, 0), static_cast<int>(events.size()) - 1) << "the embedding's";
  }
}

TEST(Engine, TrafficOfAStep_IsWhatThePlanPredicts) {
  const plan::Plan plan = testing::make_tiny_plan({.ranks = 2, .bucket_bytes = 0});
  test::run_ranks(2, [&](comm::Communicator world) {
    mesh::Mesh mesh(world, plan.grid);
    Engine engine(plan, mesh);
    world.ledger().reset();
    const auto objective = make_next_token_objective();
    (void)engine.step(make_batches(plan, world.rank(), 0), *objective);
    for (const auto& [key, traffic] : world.ledger().table()) {
      if (key.starts_with("control/")) continue;
      ASSERT_TRUE(plan.traffic.contains(key)) << key;
      EXPECT_EQ(traffic.calls, plan.traffic.at(key).calls) << key;
      EXPECT_EQ(traffic.bytes, plan.traffic.at(key).bytes) << key;
    }
    for (const auto& [key, traffic] : plan.traffic)
      EXPECT_TRUE(traffic.calls == 0 || world.ledger().table().contains(key)) << key;
  });
}

TEST(Engine, LaterSteps_TakeNoNewMemoryFromTheSystem) {
  device::install_cpu_allocator();
  testing::with_engines({.ranks = 1}, [](int rank, Engine& engine) {
    const auto objective = make_next_token_objective();
    const auto batches = make_batches(engine.plan(), rank, 0);
    for (int i = 0; i < 3; ++i) (void)engine.step(batches, *objective);
    const auto before = device::cache_stats().system_allocations;
    for (int i = 0; i < 10; ++i) (void)engine.step(batches, *objective);
    EXPECT_EQ(device::cache_stats().system_allocations, before);
  });
}

TEST(Engine, FrozenBlock_KeepsItsWeightsWhileTheRestTrains) {
  const TinyRun run{.ranks = 2, .steps = 3, .frozen_blocks = {0, 1}};
  const auto before = train({.ranks = 2, .steps = 0, .frozen_blocks = {0, 1}}).weights;
  const auto after = train(run).weights;
  for (const auto& [name, weight] : after) {
    const bool is_frozen = name.find("layers.0.") != std::string::npos ||
                           name.find("embed_tokens") != std::string::npos;
    EXPECT_EQ(weight.equal(before.at(name)), is_frozen) << name;
  }
}

// The same loss by the general path: per-token scores and an ordinary backward.
class SumOfScores final : public Objective {
 public:
  double local_denominator(const std::vector<MicroBatch>& batches) const override {
    return next_token_->local_denominator(batches);
  }
  Tensor weights(const MicroBatch&, double) const override { return {}; }
  Tensor loss(const nn::TokenScores& scores, const MicroBatch& batch,
              double denominator) const override {
    return next_token_->loss(scores, batch, denominator);
  }

 private:
  std::unique_ptr<Objective> next_token_ = make_next_token_objective();
};

TEST(Engine, ObjectiveWithoutFixedWeights_GivesTheSameRun) {
  for (const char* compute : {"fp64", "fp16"}) {
    const TinyRun run{.ranks = 2, .overrides = {std::string("precision.compute=") + compute}};
    testing::TinyHooks hooks;
    hooks.objective = [](int) { return std::make_unique<SumOfScores>(); };
    const bool is_proof = std::string(compute) == "fp64";
    testing::expect_same_run(train(run, hooks), train(run), is_proof ? 1e-12 : 3e-2);
  }
}

TEST(Engine, Evaluate_GivesTheLossOfTheNextStep) {
  testing::with_engines({.ranks = 2}, [](int rank, Engine& engine) {
    const auto objective = make_next_token_objective();
    for (int64_t step = 0; step < 2; ++step) {
      const auto batches = make_batches(engine.plan(), rank, step);
      double sum = 0;
      for (const auto& batch : batches)
        engine.evaluate(batch, [&](const Tensor& logprob_BT) {
          EXPECT_EQ(logprob_BT.sizes(), batch.ids_BT.sizes());
          sum -= at::where(batch.targets_BT.ne(-100), logprob_BT, 0.0).sum().item<double>();
        });
      const auto eval = engine.report_eval();
      EXPECT_GT(eval.loss_sum, sum);
      const auto report = engine.step(batches, *objective);
      EXPECT_EQ(eval.target_tokens, report.target_tokens);
      EXPECT_NEAR(eval.loss(), report.loss, 1e-12);
    }
    EXPECT_EQ(engine.report_eval().target_tokens, 0);
  });
}

TEST(Engine, NextLogits_AgreeWithTheScores) {
  testing::with_engines({.steps = 1}, [](int, Engine& engine) {
    MicroBatch batch = make_batches(engine.plan(), 0, 0).front();
    batch.rows = {};
    const int64_t T = batch.ids_BT.size(1);
    batch.rows.positions_BT = at::arange(T, at::kLong).expand({2, T}).contiguous();
    batch.targets_BT = at::full_like(batch.ids_BT, 17);
    Tensor expected;
    engine.evaluate(batch,
                    [&](const Tensor& logprob_BT) { expected = logprob_BT.select(1, T - 1); });
    const Tensor logits_BV = engine.next_logits(batch.ids_BT, nullptr);
    EXPECT_EQ(logits_BV.sizes(), (at::IntArrayRef{2, 61}));
    const Tensor logprob_B = logits_BV.to(at::kDouble).log_softmax(-1).select(1, 17);
    EXPECT_LT(logprob_B.sub(expected).abs().max().item<double>(), 1e-12);
  });
}

}  // namespace
}  // namespace capstan::engine
