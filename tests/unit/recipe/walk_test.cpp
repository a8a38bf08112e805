// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Walks the key table: every key takes another legal value and then the recipe differs, every
// illegal value is refused with the key's name, every value of a later build is refused as such.
// New keys are covered by being in the table; only keys tied to others by rules need an entry
// below.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "recipe/schema_internal.h"
#include "recipe_text.h"

namespace capstan::recipe {
namespace {

using testing::HasSubstr;

// Keys of experts do nothing without experts.
Overrides of_experts(const Overrides& more) {
  Overrides all = {"model.family=moe", "model.experts.count=8"};
  for (const std::string& change : more) all.push_back("model.experts." + change);
  return all;
}

const std::map<std::string, Overrides> kTied = {
    {"run.tokens", {"run.steps=none", "run.tokens=640"}},
    {"model.num_key_value_heads", {"model.num_key_value_heads=2"}},
    {"model.hidden_act", {"model.family=gpt2", "model.hidden_act=gelu"}},
    {"model.layer_norm_eps", {"model.family=gpt2", "model.layer_norm_eps=1.0e-6"}},
    {"model.max_position_embeddings", {"model.max_position_embeddings=32"}},
    {"model.family", of_experts({})},
    {"model.experts.count", of_experts({})},
    {"model.experts.per_token", of_experts({"per_token=3"})},
    {"model.experts.intermediate_size", of_experts({"intermediate_size=24"})},
    {"model.experts.shared_intermediate_size", of_experts({"shared_intermediate_size=48"})},
    {"model.experts.shared_gate", of_experts({"shared_intermediate_size=48", "shared_gate=true"})},
    {"model.experts.router", of_experts({"router=sigmoid"})},
    {"model.experts.normalize_weights", of_experts({"normalize_weights=false"})},
    {"model.experts.groups", of_experts({"groups=2"})},
    {"model.experts.groups_per_token", of_experts({"groups=4", "groups_per_token=2"})},
    {"model.experts.scaling", of_experts({"scaling=2.5"})},
    {"model.experts.auxiliary_loss", of_experts({"auxiliary_loss=0.01"})},
    {"model.experts.auxiliary_scope",
     of_experts({"auxiliary_loss=0.01", "auxiliary_scope=global"})},
    {"model.experts.z_loss", of_experts({"z_loss=0.001"})},
    {"model.experts.bias_update_rate", of_experts({"bias_update_rate=0.001"})},
    {"model.experts.capacity_factor", of_experts({"capacity_factor=1.5"})},
    {"model.frozen", {"model.frozen=['*norm*', '!model.norm.weight']"}},
    {"data.train", {"data.train=[{path: corpus/train}, {path: corpus/more}]"}},
    {"data.validation", {"data.validation=[]"}},
    {"batch.micro_samples", {"batch.micro_samples=4"}},
    {"optimizer.betas", {"optimizer.betas=[0.8, 0.9]"}},
    {"optimizer.spike_skip.window",
     {"optimizer.spike_skip.sigma=6", "optimizer.spike_skip.window=64"}},
    {"precision.master", {"precision.compute=fp64", "precision.master=fp64"}},
    {"optimizer.sophia.rho", {"optimizer.name=sophia", "optimizer.sophia.rho=0.1"}},
    {"optimizer.sophia.interval", {"optimizer.name=sophia", "optimizer.sophia.interval=5"}},
    {"precision.gradients", {"precision.compute=fp64", "precision.gradients=fp64"}},
    {"precision.keep_fp32", {"precision.keep_fp32=['*norm*']"}},
    {"precision.residual", {"precision.residual=fp32"}},
    {"precision.fp8.gradients", {"precision.fp8.scaling=row", "precision.fp8.gradients=e4m3"}},
    {"precision.fp8.history", {"precision.fp8.scaling=delayed", "precision.fp8.history=8"}},
    {"precision.loss_scale", {"precision.compute=fp16", "precision.loss_scale=1024"}},
    {"checkpoint.keep_every_steps",
     {"checkpoint.interval_steps=2", "checkpoint.keep_every_steps=4"}},
    {"metrics.trace.steps", {"metrics.trace.first_step=2", "metrics.trace.steps=5"}},
    {"parallel.sequence", {"parallel.tensor=2", "parallel.sequence=true"}},
    {"parallel.pipeline.split", {"parallel.pipeline.size=2", "parallel.pipeline.split=[1, 1]"}},
    {"parallel.zero.stage", {"parallel.zero.stage=2"}},
    {"parallel.recompute.parts",
     {"parallel.recompute.mode=selective", "parallel.recompute.parts=[mlp, norm]"}},
    {"lr_schedule.decay", {"lr_schedule.decay=5"}},
    {"lr_schedule.warmup", {"lr_schedule.warmup=5"}},
};

// Keys with exactly one legal value in this build.
bool is_fixed(const Key& key) {
  return key.bounds.low == key.bounds.high || !key.later_feature.empty() ||
         (key.is_choice && find_choice_key(key.path)->available.size() == 1);
}

std::string another_choice(const Key& key, const std::string& current) {
  for (const std::string& value : find_choice_key(key.path)->available) {
    if (value != current) return value;
  }
  return "";
}

std::string another_value(const Key& key, const Value& current) {
  if (key.is_choice) return another_choice(key, std::get<std::string>(current));
  switch (key.type) {
    case Type::kBoolean:
      return std::get<bool>(current) ? "false" : "true";
    case Type::kInteger:
      return std::to_string(
          std::holds_alternative<int64_t>(current) ? 2 * std::get<int64_t>(current) : 8);
    case Type::kNumber:
      return fmt::format(
          "{}", std::holds_alternative<double>(current) ? std::get<double>(current) / 2 : 0.5);
    default:
      return "other";
  }
}

Overrides change_of(const Key& key, const Recipe& base) {
  const auto tied = kTied.find(key.path);
  if (tied != kTied.end()) return tied->second;
  return {path_of(key, 0) + "=" + another_value(key, get_value(key, base, 0))};
}

std::vector<std::string> illegal_values(const Key& key) {
  std::vector<std::string> values = {"{a: 1}", "[[1]]",   "~",        "\"\"",
                                     "&a x",   "!!str x", "\"a\\nb\""};
  if (key.is_choice) values.push_back("zzz");
  if (key.is_name) values.insert(values.end(), {"a/b", "a b", std::string(65, 'a')});
  if (key.type == Type::kText || key.type == Type::kTextList) {
    if (!key.is_choice) values.insert(values.end(), {"12", "1.5", "true", "yes"});
    return values;
  }
  values.insert(values.end(), {"zzz", "010", "1_000", ".inf", "0x10", "yes", "'1'", "1e400"});
  const std::string mould = key.exact_count ? "[{0}, {0}]" : "{0}";
  const Range& range = key.bounds;
  const auto add = [&](double value) { values.push_back(fmt::format(fmt::runtime(mould), value)); };
  if (std::isfinite(range.low)) add(range.low_open ? range.low : range.low - 1);
  if (std::isfinite(range.high))
    add(range.high_open ? range.high : range.high + 1 + range.high / 2);
  if (key.type == Type::kInteger)
    values.insert(values.end(), {"1.5", "1e3", "99999999999999999999"});
  if (key.type == Type::kBoolean) values.insert(values.end(), {"1", "0", "True", "off"});
  return values;
}

class EveryKey : public testing::TestWithParam<size_t> {
 protected:
  const Key& key() const { return keys()[GetParam()]; }
  const Recipe base_ = parse(kSmall).recipe;
};

TEST_P(EveryKey, AnotherLegalValue_ChangesTheRecipe) {
  if (is_fixed(key())) return;
  const Overrides change = change_of(key(), base_);
  ASSERT_EQ(complaint_of(kSmall, change), "") << change.back();
  const Recipe changed = parse(kSmall, change).recipe;
  EXPECT_NE(dump_recipe(changed), dump_recipe(base_));
  const auto differences = compare_recipes(base_, changed);
  const auto found = std::find_if(
      differences.begin(), differences.end(),
      [&](const Difference& difference) { return pattern_of(difference.key) == key().path; });
  ASSERT_NE(found, differences.end());
  EXPECT_EQ(found->free_at_resume, key().is_free);
  const bool all_free =
      std::all_of(differences.begin(), differences.end(),
                  [](const Difference& difference) { return difference.free_at_resume; });
  EXPECT_EQ(identity_hash(changed) == identity_hash(base_), all_free);
}

TEST_P(EveryKey, IllegalValues_AreRefusedByName) {
  const std::string path = path_of(key(), 0);
  for (const std::string& value : illegal_values(key())) {
    const auto problems = problems_of(kSmall, Overrides{path + "=" + value});
    EXPECT_FALSE(problems.empty()) << path << "=" << value;
    for (const Problem& problem : problems) {
      EXPECT_THAT(problem.key, testing::StartsWith(path));
      EXPECT_THAT(problem.text(), testing::StartsWith("--set:1:1: error: " + path)) << value;
    }
  }
}

TEST_P(EveryKey, ValuesOfLaterBuilds_AreRefusedAsSuch) {
  if (key().is_choice) {
    const ChoiceKey* choice = find_choice_key(key().path);
    ASSERT_NE(choice, nullptr) << key().path;
    for (const std::string& value : choice->known) {
      EXPECT_THAT(complaint_of(kSmall, Overrides{key().path + "=" + value}),
                  HasSubstr(key().path + ": '" + value + "' is not in this build (has: "));
    }
  }
  if (key().later_feature.empty()) return;
  const std::map<std::string, std::string> later = {{"parallel.pipeline.split", "[1, 1]"},
                                                    {"parallel.zero.stage", "2"}};
  const auto found = later.find(key().path);
  const std::string value =
      found != later.end() ? found->second : another_value(key(), get_value(key(), base_));
  EXPECT_THAT(complaint_of(kSmall, Overrides{key().path + "=" + value}),
              HasSubstr("(" + key().later_feature + " is not in this build)"));
}

TEST_P(EveryKey, DefaultWrittenOut_IsAccepted) {
  if (key().is_required) return;
  const std::string text =
      path_of(key(), 0) + "=" + format_value(key(), get_value(key(), base_, 0));
  if (key().type == Type::kMapList) return;
  EXPECT_EQ(complaint_of(kSmall, Overrides{text}), "") << text;
}

INSTANTIATE_TEST_SUITE_P(Table, EveryKey, testing::Range(size_t{0}, keys().size()));

TEST(KeyTable, PathsAreUniqueAndDocumented) {
  std::vector<std::string> paths;
  for (const Key& key : keys()) {
    paths.push_back(key.path);
    EXPECT_TRUE(key.doc.ends_with('.')) << key.path;
    EXPECT_EQ(key.is_choice, find_choice_key(key.path) != nullptr) << key.path;
  }
  std::sort(paths.begin(), paths.end());
  EXPECT_EQ(std::unique(paths.begin(), paths.end()), paths.end());
  for (const ChoiceKey& choice : choice_keys())
    EXPECT_NE(find_key(choice.key), nullptr) << choice.key;
}

TEST(KeyTable, DefaultsAreLegal) {
  for (const Key& key : keys()) {
    if (!key.is_choice || key.type != Type::kText) continue;
    EXPECT_THAT(find_choice_key(key.path)->available,
                testing::Contains(std::get<std::string>(default_value(key))))
        << key.path;
  }
}

}  // namespace
}  // namespace capstan::recipe
