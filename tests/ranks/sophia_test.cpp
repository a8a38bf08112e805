// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Sophia's pass on drawn labels: when it runs, what it leaves, and that layouts do not change it.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <mutex>

#include "capstan/base/error.h"
#include "ranks/engine_fixture.h"

namespace capstan::engine::testing {
namespace {

std::vector<std::string> sophia(std::vector<std::string> more = {}) {
  more.insert(more.end(), {"optimizer.name=sophia", "optimizer.betas=[0.965, 0.99]",
                           "optimizer.sophia.interval=2", "optimizer.lr=1.0e-3"});
  return more;
}

Tensor curvature_of(Engine& engine) {
  std::vector<Tensor> parts;
  for (const auto& entry : engine.state_entries())
    if (entry.kind == "optimizer.hessian") parts.push_back(entry.tensor.reshape({-1}).clone());
  return at::cat(parts);
}

// Squares of the gradients of every pass, by the first bucket that a pass sums.
struct Passes {
  std::mutex mutex;
  std::vector<double> squares;
  [[nodiscard]] TinyHooks hooks() {
    return {.hooks =
                [this](int) {
                  EngineHooks made;
                  made.trace = [this](const char* what, int block) {
                    const std::lock_guard lock(mutex);
                    if (std::string_view(what) == "forward" && block == 0 && starts_pass())
                      squares.push_back(0);
                  };
                  made.after_reduce = [this](int, const Tensor& gradients) {
                    const std::lock_guard lock(mutex);
                    squares.back() += gradients.to(at::kDouble).square().sum().item<double>();
                  };
                  return made;
                },
            .objective = {}};
  }
  int forwards = 0, micro_batches = 4;
  bool starts_pass() { return forwards++ % micro_batches == 0; }
};

TEST(Sophia, CurvatureIsThatOfTheExtraPass) {
  Passes passes;
  with_engines(
      {.ranks = 1, .overrides = sophia()},
      [&](int rank, Engine& engine) {
        ASSERT_EQ(engine.plan().batch.micro_batches, passes.micro_batches);
        const auto objective = make_next_token_objective();
        const double tokens = 8 * 12;
        Tensor before = curvature_of(engine);
        EXPECT_EQ(before.abs().sum().item<double>(), 0);
        for (int step = 0; step < 5; ++step) {
          const size_t done = passes.squares.size();
          (void)engine.step(make_batches(engine.plan(), rank, step), *objective);
          const bool estimates = step == 2 || step == 4;
          ASSERT_EQ(passes.squares.size() - done, estimates ? 2 : 1) << step;
          const Tensor after = curvature_of(engine);
          const double grown = (after - before * (estimates ? 0.99 : 1)).sum().item<double>();
          const double want = estimates ? 0.01 * tokens * passes.squares[done] : 0;
          EXPECT_NEAR(grown, want, 1e-12 * (1 + want)) << step;
          EXPECT_NE(passes.squares[done], estimates ? passes.squares[done + 1] : -1);
          before = after;
        }
      },
      passes.hooks());
}

struct LayoutOf {
  int ranks;
  std::vector<std::string> overrides;
};

TEST(Sophia, Layouts_EqualOneRank) {
  const auto tied = [](bool is_tied) {
    return std::string("model.tie_word_embeddings=") + (is_tied ? "true" : "false");
  };
  for (const bool is_tied : {false, true}) {
    const TinyResult one = train({.steps = 6, .overrides = sophia({tied(is_tied)})});
    for (const LayoutOf& layout :
         {LayoutOf{2, {"batch.micro_samples=1"}},
          {4, {"parallel.zero.stage=3", "batch.micro_samples=1"}},
          {2, {"parallel.tensor=2"}},
          {4, {"parallel.tensor=2", "parallel.sequence=true", "parallel.zero.stage=1"}},
          {2, {"parallel.context.size=2"}},
          {2,
           {"parallel.pipeline.size=2", "parallel.pipeline.schedule=zero_bubble",
            "parallel.recompute.mode=block"}},
          {4, {"parallel.pipeline.size=2", "parallel.pipeline.schedule=1f1b", "parallel.tensor=2"}},
          {2, {"parallel.zero.stage=2", "parallel.zero.offload=optimizer"}}}) {
      auto overrides = layout.overrides;
      overrides.push_back(tied(is_tied));
      SCOPED_TRACE(overrides.front());
      const TinyResult run =
          train({.ranks = layout.ranks, .steps = 6, .overrides = sophia(overrides)});
      for (size_t i = 0; i < one.reports.size(); ++i) {
        EXPECT_NEAR(run.reports[i].loss, one.reports[i].loss, 1e-9) << i;
        EXPECT_NEAR(run.reports[i].grad_norm, one.reports[i].grad_norm, 1e-9) << i;
      }
    }
  }
}

std::vector<std::string> with_experts(std::vector<std::string> more = {}) {
  more.insert(more.end(), {"model.family=moe", "model.experts.count=4", "model.experts.per_token=2",
                           "model.experts.z_loss=0.001", "model.experts.bias_update_rate=0.01"});
  return sophia(more);
}

TEST(Sophia, LayoutsOfExperts_EqualOneRank) {
  const TinyResult one = train({.steps = 5, .overrides = with_experts()});
  for (const LayoutOf& layout : {LayoutOf{2, {"parallel.expert=2", "parallel.zero.stage=1"}},
                                 {2, {"parallel.expert=2", "parallel.tensor=2"}},
                                 {2, {"parallel.context.size=2"}},
                                 {2, {"parallel.zero.stage=3", "parallel.recompute.mode=block"}},
                                 {2, {"parallel.pipeline.size=2"}}}) {
    SCOPED_TRACE(layout.overrides.front());
    const TinyResult run =
        train({.ranks = layout.ranks, .steps = 5, .overrides = with_experts(layout.overrides)});
    for (size_t i = 0; i < one.reports.size(); ++i) {
      EXPECT_NEAR(run.reports[i].loss, one.reports[i].loss, 1e-9) << i;
      EXPECT_NEAR(run.reports[i].grad_norm, one.reports[i].grad_norm, 1e-9) << i;
      for (size_t e = 0; e < one.reports[i].experts.size(); ++e)
        EXPECT_EQ(run.reports[i].experts[e].tokens, one.reports[i].experts[e].tokens) << i;
    }
  }
}

// Weights that do not move, so that runs differ in the pass alone.
std::vector<std::string> at_rest(std::vector<std::string> more) {
  more.insert(more.end(), {"optimizer.name=sophia", "optimizer.sophia.interval=1",
                           "optimizer.betas=[0.9, 0]", "optimizer.lr=1.0e-300"});
  return more;
}
Tensor curvature_at_rest(std::vector<std::string> more) {
  Tensor made;
  with_engines({.overrides = at_rest(std::move(more))}, [&](int rank, Engine& engine) {
    const auto objective = make_next_token_objective();
    for (int step = 0; step < 2; ++step)
      (void)engine.step(make_batches(engine.plan(), rank, step), *objective);
    made = curvature_of(engine);
  });
  return made;
}

TEST(Sophia, LossesOnRouters_AreNoPartOfTheCurvature) {
  const std::vector<std::string> experts = {"model.family=moe", "model.experts.count=4",
                                            "model.experts.per_token=2"};
  auto with_losses = experts;
  with_losses.insert(with_losses.end(),
                     {"model.experts.auxiliary_loss=0.5", "model.experts.z_loss=0.5"});
  auto without = experts;
  without.emplace_back("model.experts.auxiliary_loss=0");
  const Tensor one = curvature_at_rest(without);
  EXPECT_GT(one.sum().item<double>(), 0);
  EXPECT_TRUE(curvature_at_rest(with_losses).equal(one));
}

// A choice is counted in the pass of the step and not in the optimizer's.
TEST(Sophia, TheExtraPassCountsNoToken) {
  const auto overrides = with_experts();
  const TinyResult run = train({.steps = 4, .overrides = overrides});
  for (const StepReport& report : run.reports) {
    ASSERT_FALSE(report.experts.empty());
    for (const auto& load : report.experts) {
      double tokens = 0;
      for (const auto count : load.tokens) tokens += static_cast<double>(count);
      EXPECT_EQ(tokens, 8 * 12 * 2);
    }
  }
}

// The scale of the loss is none of the curvature's.
TEST(Sophia, LossScaleOfFp16_LeavesTheCurvature) {
  const Tensor wide = curvature_at_rest({"precision.compute=fp32"}).to(at::kDouble);
  const auto distance = [&](const char* scale) {
    const Tensor narrow = curvature_at_rest({"precision.compute=fp16", scale}).to(at::kDouble);
    return (narrow - wide).norm().item<double>() / wide.norm().item<double>();
  };
  EXPECT_LT(distance("precision.loss_scale=256"), 0.02);
  EXPECT_LT(distance("precision.loss_scale=4096"), 0.02);
  EXPECT_LT(distance("precision.loss_scale=dynamic"), 0.02);
}

// Where gradients of the pass overflow their curvature stays; the run goes on.
TEST(Sophia, OverflowOfFp16_LeavesTheCurvature) {
  const Tensor overflown =
      curvature_at_rest({"precision.compute=fp16", "precision.loss_scale=1.0e+30"});
  EXPECT_TRUE(overflown.isfinite().all().item<bool>());
}

// Without the pass the run would be another one.
TEST(Sophia, TheCurvatureMatters) {
  const TinyResult one = train({.steps = 6, .overrides = sophia()});
  auto rarely = sophia();
  rarely.push_back("optimizer.sophia.interval=100");
  const TinyResult signs = train({.steps = 6, .overrides = rarely});
  EXPECT_EQ(one.reports[1].loss, signs.reports[1].loss);
  EXPECT_EQ(one.reports[2].loss, signs.reports[2].loss);
  EXPECT_NE(one.reports[3].loss, signs.reports[3].loss);
}

class WithoutWeights final : public Objective {
 public:
  double local_denominator(const std::vector<MicroBatch>&) const override { return 1; }
  Tensor weights(const MicroBatch&, double) const override { return {}; }
  Tensor loss(const nn::TokenScores& scores, const MicroBatch&, double) const override {
    return scores.logprob_BT.sum().neg() * 1e-2;
  }
};

TEST(Sophia, ObjectiveWithoutTokenWeights_IsRefused) {
  const TinyHooks hooks{.hooks = {},
                        .objective = [](int) { return std::make_unique<WithoutWeights>(); }};
  try {
    (void)train({.steps = 4, .overrides = sophia()}, hooks);
    FAIL() << "nothing was thrown";
  } catch (const std::exception& e) {
    EXPECT_NE(std::string(e.what()).find("without token weights"), std::string::npos) << e.what();
  }
}

}  // namespace
}  // namespace capstan::engine::testing
