// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Parameters that a recipe freezes, over layouts.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "ranks/engine_fixture.h"

namespace capstan::engine::testing {
namespace {

struct Frozen {
  const char* patterns;
  std::function<bool(const std::string&)> is_frozen;
};

bool contains(const std::string& name, const char* part) {
  return name.find(part) != std::string::npos;
}

const Frozen kFrozen[] = {
    {"['*embed_tokens*', 'model.layers.1.self_attn.*']",
     [](const std::string& name) {
       return contains(name, "embed_tokens") || contains(name, "layers.1.self_attn");
     }},
    {"['*', '!*.bias']", [](const std::string& name) { return !contains(name, ".bias"); }},
    {"['*', '!model.layers.1.mlp.down_proj.weight']",
     [](const std::string& name) { return !contains(name, "layers.1.mlp.down_proj"); }},
};

const std::vector<std::string> kLayouts[] = {
    {},
    {"parallel.zero.stage=1"},
    {"parallel.zero.stage=3", "parallel.zero.offload=all"},
    {"parallel.pipeline.size=2", "parallel.pipeline.schedule=1f1b"},
    {"parallel.tensor=2", "parallel.sequence=true", "parallel.recompute.mode=block"}};

std::vector<std::string> overrides_of(const Frozen& frozen, std::vector<std::string> layout) {
  layout.push_back(std::string("model.frozen=") + frozen.patterns);
  layout.push_back("model.attention_bias=true");
  return layout;
}

TEST(FrozenParameters, KeepTheirBitsWhileTheRestTrainsAsOnOneRank) {
  for (const Frozen& frozen : kFrozen) {
    const TinyResult one = train({.ranks = 1, .overrides = overrides_of(frozen, {})});
    const Weights start =
        train({.ranks = 1, .steps = 0, .overrides = overrides_of(frozen, {})}).weights;
    for (const auto& [name, weight] : one.weights)
      EXPECT_EQ(weight.equal(start.at(name)), frozen.is_frozen(name)) << name << frozen.patterns;
    for (const auto& layout : kLayouts) {
      const TinyRun run{.ranks = 2, .overrides = overrides_of(frozen, layout)};
      const TinyResult result = train(run);
      for (size_t i = 0; i < one.reports.size(); ++i) {
        EXPECT_NEAR(result.reports[i].loss, one.reports[i].loss, 1e-9) << frozen.patterns;
        EXPECT_NEAR(result.reports[i].grad_norm, one.reports[i].grad_norm, 1e-9);
      }
    }
  }
}

TEST(FrozenParameters, HaveNoGradientAndNoMomentsButAreSaved) {
  const Frozen& frozen = kFrozen[0];
  for (const auto& layout : kLayouts)
    with_engines({.ranks = 2, .overrides = overrides_of(frozen, layout)}, [&](int, Engine& engine) {
      bool is_saved = false;
      for (const auto& entry : engine.state_entries()) {
        const bool is_weight = entry.kind == "model";
        EXPECT_TRUE(is_weight || !frozen.is_frozen(entry.name)) << entry.kind << ' ' << entry.name;
        is_saved = is_saved || (is_weight && frozen.is_frozen(entry.name));
      }
      EXPECT_TRUE(is_saved);
    });
}

// The norm of what is trained: the frozen rest has no part in it.
TEST(FrozenParameters, HaveNoPartInTheNorm) {
  const auto norm = [](const char* patterns) {
    const TinyRun run{
        .ranks = 1, .steps = 1, .overrides = {std::string("model.frozen=") + patterns}};
    return train(run).reports.front().grad_norm;
  };
  const double all = norm("[]"), front = norm("['*embed_tokens*']"),
               rest = norm("['*', '!*embed_tokens*']");
  EXPECT_NEAR(all * all, front * front + rest * rest, 1e-12);
  EXPECT_LT(front, all);
}

}  // namespace
}  // namespace capstan::engine::testing
