// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Parameters that stay in fp32 beside bf16 ones: what ops read are the master's values.
#include <gtest/gtest.h>

#include <utility>

#include "ranks/engine_fixture.h"

namespace capstan::engine::testing {
namespace {

// The loss of the same rows before and after three updates of norms alone, so small that bf16
// rounds them away.
std::pair<double, double> losses(const std::string& kept, const std::vector<std::string>& layout,
                                 int ranks) {
  TinyRun run{.ranks = ranks, .overrides = layout};
  for (const std::string& setting :
       {std::string("precision.compute=bf16"), std::string("optimizer.lr=1.0e-4"),
        std::string("optimizer.weight_decay=0"), std::string("model.frozen=['*', '!*norm*']"),
        "precision.keep_fp32=" + kept})
    run.overrides.push_back(setting);
  std::pair<double, double> result;
  with_engines(run, [&](int rank, Engine& engine) {
    const int data = engine.plan().grid.data_parallel_index(rank);
    const auto objective = make_next_token_objective();
    const auto evaluate = [&] {
      for (const auto& batch : make_batches(engine.plan(), data, 9)) engine.evaluate(batch);
      return engine.report_eval().loss();
    };
    const double before = evaluate();
    for (int64_t step = 0; step < 3; ++step)
      (void)engine.step(make_batches(engine.plan(), data, step), *objective);
    const double after = evaluate();
    if (rank == 0) result = {before, after};
  });
  return result;
}

TEST(KeepWide, StepsThatBf16RoundsAway_CountInFp32) {
  const std::vector<std::string> layouts[] = {
      {}, {"parallel.zero.stage=3"}, {"parallel.tensor=2", "parallel.sequence=true"}};
  for (const auto& layout : layouts) {
    const int ranks = layout.empty() ? 1 : 2;
    const auto [rounded_before, rounded] = losses("[]", layout, ranks);
    EXPECT_EQ(rounded_before, rounded);
    const auto [before, after] = losses("['*norm*']", layout, ranks);
    EXPECT_EQ(before, rounded_before) << "ones are ones in both types";
    EXPECT_NE(before, after);
    EXPECT_NEAR(after / before, 1, 1e-3);
  }
}

}  // namespace
}  // namespace capstan::engine::testing
