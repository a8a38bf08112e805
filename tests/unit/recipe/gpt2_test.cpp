// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Rules of model.family: gpt2.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "recipe_text.h"

namespace capstan::recipe {
namespace {

using ::testing::HasSubstr;

void expect_problem(const Overrides& overrides, const std::string& key,
                    const std::vector<std::string>& words) {
  const auto problems = problems_of(kSmall, overrides);
  ASSERT_EQ(problems.size(), 1U) << complaint_of(kSmall, overrides);
  EXPECT_EQ(problems[0].key, key);
  for (const std::string& word : words) EXPECT_THAT(problems[0].text(), HasSubstr(word));
}

void expect_problem_of_gpt2(const std::string& key, const std::string& value,
                            const std::vector<std::string>& words) {
  expect_problem({"model.family=gpt2", key + "=" + value}, key, words);
}

TEST(Gpt2Rules, WhatIsLeftOutFollows) {
  const Resolved r = parse(kSmall, {"model.family=gpt2"});
  EXPECT_EQ(r.recipe.model.hidden_act, "gelu_pytorch_tanh");
  EXPECT_TRUE(r.recipe.model.attention_bias);
  EXPECT_TRUE(r.recipe.model.tie_word_embeddings);
  EXPECT_EQ(parse(kSmall).recipe.model.hidden_act, "silu");
  EXPECT_FALSE(parse(kSmall).recipe.model.attention_bias);
  EXPECT_TRUE(r.recipe.model.attention_output_bias);
}

TEST(Gpt2Rules, TheOutputBiasFollowsTheOthers) {
  const auto output = [](const Overrides& overrides) {
    return parse(kSmall, overrides).recipe.model.attention_output_bias;
  };
  EXPECT_FALSE(output({}));
  EXPECT_TRUE(output({"model.attention_bias=true"}));
  EXPECT_FALSE(output({"model.attention_bias=true", "model.attention_output_bias=false"}));
  EXPECT_TRUE(output({"model.attention_output_bias=true"}));
  const Resolved r = parse(kSmall, {"model.attention_bias=true", "model.qk_norm=true"});
  EXPECT_EQ(dump_recipe(parse(dump_recipe(r, true)).recipe), dump_recipe(r.recipe));
}

TEST(Gpt2Rules, WhatIsWrittenIsRead) {
  const Resolved r = parse(
      kSmall, {"model.family=gpt2", "model.hidden_act=gelu", "model.layer_norm_eps=1e-6",
               "model.attention_bias=true", "model.num_key_value_heads=4", "model.head_dim=8"});
  EXPECT_EQ(r.recipe.model.hidden_act, "gelu");
  EXPECT_EQ(r.recipe.model.layer_norm_eps, 1e-6);
}

// A run's own recipe.yaml has every key.
TEST(Gpt2Rules, DumpsAreLegal) {
  const Resolved r = parse(kSmall, {"model.family=gpt2"});
  EXPECT_EQ(dump_recipe(parse(dump_recipe(r, true)).recipe), dump_recipe(r.recipe));
}

TEST(Gpt2Rules, WhatItDoesNotHaveIsRefused) {
  expect_problem_of_gpt2("model.hidden_act", "silu", {"gelu_pytorch_tanh or gelu", "no gate"});
  expect_problem_of_gpt2("model.attention_bias", "false", {"need true", "has a bias"});
  expect_problem_of_gpt2("model.attention_output_bias", "false", {"need true", "has a bias"});
  expect_problem_of_gpt2("model.qk_norm", "true", {"need false", "as they are"});
  expect_problem_of_gpt2("model.rms_norm_eps", "1e-6", {"Set model.layer_norm_eps"});
  expect_problem_of_gpt2("model.rope_theta", "500000.0", {"learned positions"});
  expect_problem_of_gpt2("model.sliding_window", "8", {"need none", "whole row"});
  expect_problem_of_gpt2("model.num_key_value_heads", "2", {"auto or 4"});
  expect_problem_of_gpt2("model.head_dim", "16", {"hidden_size / num_attention_heads"});
  expect_problem_of_gpt2("model.experts.count", "8", {"gpt2 has no experts"});
}

TEST(Gpt2Rules, OthersDoNotHaveWhatItHas) {
  expect_problem({"model.hidden_act=gelu"}, "model.hidden_act", {"need silu", "llama is SwiGLU"});
  expect_problem({"model.layer_norm_eps=1e-6"}, "model.layer_norm_eps",
                 {"llama has RMSNorm", "Set model.rms_norm_eps"});
}

// Rotary positions turn pairs; learned ones do not.
TEST(Gpt2Rules, HeadsMayBeOdd) {
  EXPECT_NO_THROW((void)parse(kSmall, {"model.family=gpt2", "model.hidden_size=36"}));
}

}  // namespace
}  // namespace capstan::recipe
