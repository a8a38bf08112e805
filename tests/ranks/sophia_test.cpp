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
