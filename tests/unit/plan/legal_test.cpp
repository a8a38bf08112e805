// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The other half of "what the plan accepts, runs" (the equivalence test): what can run is not
// refused, and what is refused is told a way out that works. Random recipes against an oracle of
// counting (legal_oracle.h). CAPSTAN_RECIPES sets the number of draws, CAPSTAN_LAYOUT_SEED the
// seed.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <regex>

#include "capstan/base/text.h"
#include "capstan/plan/plan.h"
#include "legal_oracle.h"

namespace capstan::plan {
namespace {

using testing::Draw;
using testing::Reason;

constexpr const char* kRecipe = R"(version: 1
run: {name: legal, steps: 10}
model:
  vocab_size: 61
  hidden_size: 32
  intermediate_size: 48
  num_hidden_layers: 4
  num_attention_heads: 4
  head_dim: 8
data:
  tokenizer: data/tok
  train: [{path: data/train}]
batch: {global_samples: 8, micro_samples: 1, sequence_length: 32}
optimizer: {lr: 1.0e-2}
)";

uint64_t number_from(const char* variable, uint64_t otherwise) {
  const char* text = std::getenv(variable);
  return text ? std::stoull(text) : otherwise;
}

// What the plan says against a draw; of an accepted one the plan is looked at.
std::vector<recipe::Problem> problems_of(const Draw& draw) {
  Topology topology;
  topology.world_size = topology.local_size = static_cast<int>(draw.world);
  topology.physical_cores = 64;
  try {
    const Plan plan = make_plan(recipe::parse_recipe(kRecipe, "legal.yaml", draw.overrides()),
                                topology, {.tokenizer_vocab_size = 61});
    EXPECT_EQ(plan.grid.size(), draw.world);
    EXPECT_TRUE(check_schedule(plan.schedule).empty()) << draw.describe();
    EXPECT_NO_THROW((void)plan.model().layout.rank(plan.grid.size() - 1)) << draw.describe();
  } catch (const recipe::RecipeError& error) {
    return error.problems();
  }
  return {};
}

std::vector<Reason> reasons_against(const Draw& draw) {
  std::vector<Reason> all = testing::contradictions(draw);
  for (Reason& reason : testing::limits(draw)) all.push_back(std::move(reason));
  return all;
}

std::set<std::string> names_of(const std::vector<Reason>& reasons) {
  std::set<std::string> names;
  for (const Reason& reason : reasons) names.insert(reason.name);
  return names;
}

// Tells the rules of one key apart, whatever the numbers.
std::string rule_of(const recipe::Problem& problem) {
  std::string rule = problem.key + ": " + problem.why;
  std::erase_if(rule, [](char c) { return c >= '0' && c <= '9'; });
  return rule;
}

// As many ranks are started as the new axis needs; a split goes with its stages, and sequence
// parallelism with its axis.
Draw with(Draw draw, const std::string& key, const std::string& value) {
  const bool is_axis = key == "parallel.tensor" || key == "parallel.pipeline.size";
  if (is_axis) {
    const auto found = draw.values.find(key);
    const int64_t before = found == draw.values.end() ? 1 : std::stoll(found->second);
    if (draw.world % before == 0) draw.world = draw.world / before * std::stoll(value);
  }
  if (key.starts_with("parallel.pipeline")) draw.values.erase("parallel.pipeline.split");
  if (key == "parallel.tensor" && value == "1") draw.values.erase("parallel.sequence");
  draw.values[key] = value;
  return draw;
}

std::vector<std::string> words_matching(const std::string& text, const std::regex& words) {
  std::vector<std::string> found;
  for (std::sregex_iterator it(text.begin(), text.end(), words), end; it != end; ++it)
    found.push_back((*it)[1]);
  return found;
}

// The recipes that a problem's FIX names: "Set KEY: VALUE and KEY: VALUE, or set ...", "Leave the
// key out", "Start N or N ranks", "Use N or N", "Nearest: N or N", "Nearest: KEY N, N".
std::vector<Draw> ways_out(const Draw& draw, const recipe::Problem& problem) {
  static const std::regex settings("[Ss]et ([^,;]*: [^,;]*)"), setting("([a-z._]+): ([a-z_0-9]+)"),
      start("Start ([0-9 or]+) ranks"), nearest("(?:Use|Nearest:) ([a-z._]+ )?([0-9, or]+)"),
      number("([0-9]+)");
  std::vector<Draw> ways;
  std::smatch match;
  const std::string& fix = problem.fix;
  for (const std::string& list : words_matching(fix, settings)) {
    Draw way = draw;
    for (std::sregex_iterator it(list.begin(), list.end(), setting), end; it != end; ++it)
      way = with(std::move(way), (*it)[1], (*it)[2]);
    ways.push_back(std::move(way));
  }
  if (fix.starts_with("Leave the key out")) {
    ways.push_back(draw);
    ways.back().values.erase(problem.key);
  }
  if (std::regex_search(fix, match, start))
    for (const std::string& ranks : words_matching(match[1], number)) {
      ways.push_back(draw);
      ways.back().world = std::stoll(ranks);
    }
  if (std::regex_search(fix, match, nearest)) {
    std::string key = match[1];
    key = key.empty() ? problem.key : key.substr(0, key.size() - 1);
    for (const std::string& value : words_matching(match[2], number))
      ways.push_back(with(draw, key, value));
  }
  return ways;
}

// Every value that a refusal names removes that problem, and one of them brings no other.
void expect_ways_out(const Draw& draw, const recipe::Problem& problem) {
  const std::vector<Draw> ways = ways_out(draw, problem);
  EXPECT_FALSE(ways.empty()) << "no value is named: " << problem.text() << "\n  "
                             << draw.describe();
  std::set<std::string> before;
  for (const Reason& reason : reasons_against(draw)) {
    before.insert(reason.name);
    before.insert(reason.hides.begin(), reason.hides.end());
  }
  bool has_clean_way = ways.empty();
  for (const Draw& way : ways) {
    for (const recipe::Problem& left : problems_of(way))
      EXPECT_NE(rule_of(left), rule_of(problem))
          << problem.text() << "\n  " << draw.describe() << "\n  leads to: " << left.text()
          << "\n  " << way.describe();
    const std::set<std::string> after = names_of(reasons_against(way));
    has_clean_way =
        has_clean_way || std::includes(before.begin(), before.end(), after.begin(), after.end());
  }
  EXPECT_TRUE(has_clean_way) << "every value breaks something else: " << problem.text() << "\n  "
                             << draw.describe();
}

void expect_justified(const Draw& draw, const std::vector<Reason>& reasons,
                      const std::vector<recipe::Problem>& problems) {
  for (const recipe::Problem& problem : problems) {
    const bool is_justified =
        std::any_of(reasons.begin(), reasons.end(),
                    [&](const Reason& reason) { return reason.keys.contains(problem.key); });
    EXPECT_TRUE(is_justified) << "refused for nothing: " << problem.text() << "\n  "
                              << draw.describe();
    expect_ways_out(draw, problem);
  }
  if (problems.empty() && !reasons.empty())
    ADD_FAILURE() << "accepted in spite of: " << reasons.front().name << "\n  " << draw.describe();
}

TEST(Legal, RandomRecipes_AreRefusedForAReasonAndWithAWayOut) {
  std::mt19937_64 random(number_from("CAPSTAN_LAYOUT_SEED", 31));
  const uint64_t count = number_from("CAPSTAN_RECIPES", 3000);
  uint64_t accepted = 0;
  std::map<std::string, int> draws_with;  // a reason
  for (uint64_t i = 0; i < count; ++i) {
    const Draw draw = testing::draw_recipe(random);
    const std::vector<recipe::Problem> problems = problems_of(draw);
    const std::vector<Reason> reasons = reasons_against(draw);
    expect_justified(draw, reasons, problems);
    accepted += problems.empty() ? 1 : 0;
    for (const Reason& reason : reasons) ++draws_with[reason.name];
  }
  fmt::print("{} recipes, {} accepted\n", count, accepted);
  EXPECT_GT(accepted, count / 10);
  for (const std::string& name : testing::reason_names())
    EXPECT_GT(draws_with[name], 0) << name << " refuses no draw";
}

}  // namespace
}  // namespace capstan::plan
