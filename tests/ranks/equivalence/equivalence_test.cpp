// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Random legal layouts compute the run of one rank. CAPSTAN_LAYOUTS sets the number of cases,
// CAPSTAN_LAYOUT_SEED the seed.
#include "ranks/equivalence/equivalence.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <map>

#include "capstan/base/text.h"

namespace capstan::test {
namespace {

constexpr int kSteps = 4;
constexpr double kBar = 1e-9;  // fp64
// Closer choices of experts may turn with the order of sums: such a case is drawn again.
constexpr double kClosestChoice = 1e-9;
// So may the sign that Lion or Sophia takes of a sum.
constexpr double kClosestSign = 1e-13;

int64_t number_from(const char* variable, int64_t otherwise) {
  const char* text = std::getenv(variable);
  return text ? std::stoll(text) : otherwise;
}

// What must be written into a recipe to see a case again.
std::string reproduce(const LayoutCase& layout) {
  return fmt::format("{} ranks, --set {}", layout.ranks(), join(layout.overrides(), " --set "));
}

void print_coverage(const std::vector<LayoutCase>& cases, size_t pairs) {
  std::map<std::string, std::map<std::string, int>> counts;
  for (const LayoutCase& layout : cases)
    for (const auto& [axis, value] : layout.values) ++counts[axis][value];
  fmt::print("{} layouts, {} pairs of values covered\n", cases.size(), pairs);
  for (const auto& [axis, values] : counts) {
    fmt::print("  {:<13}", axis);
    for (const auto& [value, count] : values) fmt::print(" {}: {}", value, count);
    fmt::print("\n");
  }
}

class References {
 public:
  const ReferenceRun& of(const LayoutCase& layout) {
    auto found = runs_.find(layout.model_key());
    if (found == runs_.end())
      found = runs_.emplace(layout.model_key(), run_reference(layout, kSteps)).first;
    closest_ = std::min(closest_, found->second.margin);
    smallest_ = std::min(smallest_, found->second.direction);
    return found->second;
  }
  [[nodiscard]] double closest_choice() const { return closest_; }
  [[nodiscard]] double smallest_direction() const { return smallest_; }
  [[nodiscard]] bool decide_closely(const LayoutCase& layout) {
    const ReferenceRun& run = of(layout);
    return run.margin < kClosestChoice || run.direction < kClosestSign;
  }

 private:
  std::map<std::string, ReferenceRun> runs_;
  double closest_ = INFINITY, smallest_ = INFINITY;
};

// And the same layout computes the same bits again.
TEST(Equivalence, RandomLayouts_ComputeTheRunOfOneRank) {
  const auto count = static_cast<int>(number_from("CAPSTAN_LAYOUTS", 300));
  const auto seed = static_cast<uint64_t>(number_from("CAPSTAN_LAYOUT_SEED", 20));
  std::vector<Pair> pairs;
  std::vector<LayoutCase> cases = draw_cases(seed, count, &pairs);
  std::mt19937_64 redraws(seed + 1);
  References references;
  std::map<std::string, int> wide;
  double worst = 0;
  int three_axes = 0, failed = 0, redrawn = 0;
  for (LayoutCase& layout : cases) {
    for (; references.decide_closely(layout); ++redrawn)
      layout = draw_case(redraws,
                         {{"family", layout.values.at("family")},
                          {"optimizer", layout.values.at("optimizer")}},
                         1000)
                   .value();
    const Comparison result = compare_layout(layout, references.of(layout), kSteps);
    worst = std::max(worst, result.error());
    three_axes += layout.wide_axes() >= 3;
    for (const char* axis : {"tp", "pp", "cp", "ep", "dp_replicate", "dp_shard", "zero", "chunks"})
      wide[axis] += layout.number(axis) > (std::string_view(axis) == "zero" ? 0 : 1);
    if (result.error() <= kBar) {
      EXPECT_EQ(hash_after_one_step(layout), result.first_hash)
          << "differs when run again: " << layout.describe() << "\n  " << reproduce(layout);
      continue;
    }
    ADD_FAILURE() << layout.describe() << "\n  loss " << result.loss << ", norm " << result.norm
                  << ", evaluation " << result.eval << ", experts " << result.experts << ", state "
                  << result.state << " in " << result.worst << "\n  "
                  << result.failure.substr(0, 600) << "\n  reproduce: " << reproduce(layout);
    if (++failed >= number_from("CAPSTAN_LAYOUT_FAILURES", 5)) break;
  }
  print_coverage(cases, pairs.size());
  fmt::print(
      "worst error {:.2e}; {} layouts with three axes above 1; {} redrawn for choices closer "
      "than {:.0e} (the closest was {:.1e}) or signs of sums below {:.0e} (the smallest was "
      "{:.1e})\n",
      worst, three_axes, redrawn, kClosestChoice, references.closest_choice(), kClosestSign,
      references.smallest_direction());
  EXPECT_LE(redrawn, std::max(1, count / 100));
  if (count < 300) return;
  EXPECT_GE(three_axes, 100);
  for (const auto& [axis, times] : wide) EXPECT_GE(times, 40) << axis << " above one";
}

// 16-bit sums depend on their order: losses and norms stay within what rounding explains.
TEST(Equivalence, Bf16Layouts_StayCloseToOneRank) {
  std::mt19937_64 random(6);
  double worst_loss = 0, worst_norm = 0;
  for (int i = 0; i < 24; ++i) {
    // Without routers: rounding turns close choices of experts, which no bar on losses describes.
    // Nor by the sign of sums, which Lion takes.
    LayoutCase layout =
        draw_case(random, {{"family", "llama"}, {"optimizer", "adamw"}}, 1000).value();
    layout.compute = "bf16";
    if (i % 2 == 1) layout.moments = "bf16";
    const Comparison result = compare_layout(layout, run_reference(layout, kSteps), kSteps);
    EXPECT_EQ(result.failure, "") << layout.describe();
    EXPECT_LE(result.loss, 0.005) << layout.describe();
    EXPECT_LE(result.norm, 0.03) << layout.describe();
    worst_loss = std::max(worst_loss, result.loss);
    worst_norm = std::max(worst_norm, result.norm);
  }
  fmt::print("bf16: loss within {:.2e}, norm within {:.2e}\n", worst_loss, worst_norm);
}

// The gather of the next block is under way while a block computes, and sums of late blocks while
// early ones still run backward.
TEST(Equivalence, GathersAndSumsAreIssuedAheadOfTheirUse) {
  LayoutCase layout;
  for (const LayoutAxis& axis : model_axes()) layout.values[axis.name] = axis.values.front();
  for (const LayoutAxis& axis : layout_axes()) layout.values[axis.name] = axis.values.front();
  layout.values["dp_shard"] = "2";
  layout.values["zero"] = "3";
  layout.values["micro"] = "2";
  const std::vector<std::string> events = trace_of_first_step(layout);
  const auto at = [&](const std::string& event) {
    const auto found = std::find(events.begin(), events.end(), event);
    EXPECT_NE(found, events.end()) << event;
    return found - events.begin();
  };
  for (int block = 1; block <= 5; ++block)
    EXPECT_LT(at(fmt::format("gather {}", block)), at(fmt::format("forward {}", block - 1)));
  const auto last = std::find(events.rbegin(), events.rend(), "backward 0");
  EXPECT_LT(at("reduce 0"), events.rend() - last - 1);
}

}  // namespace
}  // namespace capstan::test
