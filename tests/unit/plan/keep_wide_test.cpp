// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/plan/keep_wide.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "recipes.h"
#include "shapes.h"

namespace capstan::plan {
namespace {

using testing::machine;
using testing::plan_of;
using testing::resolved;

MemoryReport memory_of(const std::string& compute, const std::string& patterns,
                       const std::string& stage = "0") {
  return plan_of(resolved({"precision.compute=" + compute, "precision.keep_fp32=" + patterns,
                           "parallel.zero.stage=" + stage}),
                 machine(2))
      .memory;
}

TEST(KeepWide, BuffersAreSplitByType) {
  const Plan plan = plan_of(resolved({"precision.keep_fp32=['*norm*']"}), machine(1));
  int64_t wide = 0;
  for (const FlatBuffer& buffer : plan.model().layout.rank(0).buffers)
    for (const LocalParam& param : buffer.params) {
      const ParamSpec& spec = plan.model().table()[static_cast<size_t>(param.spec)];
      EXPECT_EQ(buffer.wide, spec.name.find("norm") != std::string::npos) << spec.name;
      EXPECT_EQ(buffer.wide, spec.wide);
      wide += buffer.wide;
    }
  EXPECT_GT(wide, 2);
}

TEST(KeepWide, ALaterPatternTakesOut) {
  const auto table = find_family("llama").param_table(testing::tiny_shape());
  const auto kept = keep_wide(table, {"*norm*", "!model.norm.weight"});
  EXPECT_FALSE(std::any_of(kept.begin(), kept.end(), [](const ParamSpec& spec) {
    return spec.wide && spec.name == "model.norm.weight";
  }));
  EXPECT_EQ(wide_apart(keep_wide(table, {"*.0.self_attn.k_proj.*"})).size(), 1u);
  EXPECT_TRUE(wide_apart(keep_wide(table, {"*.self_attn.*"})).empty());
}

// What is kept needs no copy beside the master: 4 bytes instead of 2 + 4.
TEST(KeepWide, MemoryOfAKeptWeightIsItsMaster) {
  for (const std::string stage : {"0", "1", "3"}) {
    const MemoryReport narrow = memory_of("bf16", "[]", stage);
    const MemoryReport kept = memory_of("bf16", "['*']", stage);
    const MemoryReport fp32 = memory_of("fp32", "[]", stage);
    EXPECT_GT(narrow.master, 0);
    EXPECT_EQ(kept.master, 0);
    EXPECT_EQ(kept.parameters, fp32.parameters);
    EXPECT_EQ(kept.optimizer, narrow.optimizer);
    EXPECT_EQ(memory_of("fp32", "['*norm*']", stage).master, 0);
  }
}

}  // namespace
}  // namespace capstan::plan
