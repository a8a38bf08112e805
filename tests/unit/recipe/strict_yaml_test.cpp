// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What YAML allows and recipes do not: place and words of every refusal.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>

#include "recipe_text.h"

namespace capstan::recipe {
namespace {

using testing::AllOf;
using testing::EndsWith;
using testing::HasSubstr;
using testing::StartsWith;

struct Case {
  const char* name;
  std::string text;
  std::string start;               // "LINE:COLUMN: error: KEY"
  std::vector<std::string> words;  // in the message
  size_t problems = 1;
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

std::string with_lr(const std::string& value) {
  return replaced(kSmall, "lr: 0.001", "lr: " + value);
}
std::string with_steps(const std::string& value) {
  return replaced(kSmall, "steps: 10", "steps: " + value);
}
std::string nested(size_t depth) {
  return kSmall + "deep: " + std::string(depth, '[') + std::string(depth, ']') + "\n";
}

std::string bomb() {
  std::string text = kSmall + "a0: &a0 x\n";
  for (int i = 1; i < 10; ++i) {
    const std::string before = "*a" + std::to_string(i - 1);
    text += "a" + std::to_string(i) + ": &a" + std::to_string(i) + " [";
    for (int j = 0; j < 9; ++j) text += before + (j < 8 ? "," : "");
    text += "]\n";
  }
  return text;
}

class StrictYaml : public testing::TestWithParam<Case> {};

TEST_P(StrictYaml, IsRefusedWithPlaceAndKey) {
  const std::string complaint = complaint_of(GetParam().text);
  EXPECT_THAT(complaint, StartsWith(GetParam().start));
  for (const std::string& word : GetParam().words) EXPECT_THAT(complaint, HasSubstr(word));
  if (GetParam().problems > 0) {
    EXPECT_EQ(problems_of(GetParam().text).size(), GetParam().problems) << complaint;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Encoding, StrictYaml,
    testing::Values(
        Case{"nul", kSmall + std::string("eval: \0\n", 8), "17:7: error: ", {"NUL"}},
        Case{"bad_utf8", kSmall + "eval: \xC3(\n", "17:7: error: ", {"UTF-8", "0xc3"}},
        Case{"overlong", kSmall + "eval: \xC0\xAF\n", "17:7: error: ", {"UTF-8"}},
        Case{"surrogate", kSmall + "eval: \xED\xA0\x80\n", "17:7: error: ", {"UTF-8"}},
        Case{"bom", "\xEF\xBB\xBF" + kSmall, "1:1: error: ", {"byte-order mark"}},
        Case{"utf16", std::string("\xFF\xFEv\0e\0", 6), "1:1: error: ", {"UTF-8"}},
        Case{"bell", kSmall + "# \x07\n", "17:3: error: ", {"control character 0x07"}},
        Case{"lone_cr",
             kSmall + "eval:\r  samples: 3\n",
             "17:6: error: ",
             {"control character 0x0d"}},
        Case{"tab_indent",
             kSmall + "eval:\n\tsamples: 3\n",
             "18:1: error: ",
             {"a tab", "Use spaces"}},
        Case{"tab_value", kSmall + "eval:\t{samples: 3}\n", "17:6: error: ", {"a tab"}}));

INSTANTIATE_TEST_SUITE_P(
    Document, StrictYaml,
    testing::Values(
        Case{"empty", "", "1:1: error: ", {"got nothing", "empty"}},
        Case{"comment_only", "# nothing here\n", "1:1: error: ", {"empty"}},
        Case{"null_root", "~\n", "1:1: error: ", {}},
        Case{"list_root", "- version: 1\n", "1:1: error: ", {"got a list", "map of sections"}},
        Case{"scalar_root", "hello\n", "1:1: error: ", {"got one value"}},
        Case{"second_document", kSmall + "---\nversion: 1\n", "17:1: error: ", {"second document"}},
        Case{"unclosed", kSmall + "eval: {samples: 3\n", "1", {"not YAML"}},
        Case{
            "bad_indent", replaced(kSmall, "  hidden_size", "   hidden_size"), "5:1", {"not YAML"}},
        Case{"no_colon", replaced(kSmall, "lr: 0.001", "lr 0.001"), "1", {}},
        Case{"unknown_anchor", kSmall + "eval: *nobody\n", "17:7: error: ", {"not YAML", "anchor"}},
        Case{"depth_65", nested(65), "17:70: error: ", {"more than 64 levels"}},
        Case{"depth_5000", nested(5000), "17:", {"more than 64 levels"}}));

INSTANTIATE_TEST_SUITE_P(
    Nodes, StrictYaml,
    testing::Values(
        Case{"duplicate",
             replaced(kSmall, "  lr: 0.001\n", "  lr: 0.001\n  lr: 0.002\n"),
             "17:3: error: optimizer.lr: ",
             {"the key twice", "line 16"}},
        Case{"duplicate_section",
             kSmall + "run: {seed: 3}\n",
             "17:1: error: run: ",
             {"twice", "line 2"}},
        Case{"duplicate_quoted",
             replaced(kSmall, "  lr: 0.001\n", "  lr: 0.001\n  \"lr\": 2\n"),
             "17:3: error: optimizer.lr: ",
             {"twice"}},
        Case{"unknown",
             replaced(kSmall, "hidden_size", "hiden_size"),
             "5:3: error: model.hiden_size: ",
             {"unknown key", "'model.hidden_size'"}},
        Case{"unknown_section",
             kSmall + "optimiser: {lr: 1}\n",
             "17:1: error: optimiser: ",
             {"unknown key", "'optimizer'"}},
        Case{"unknown_elsewhere",
             kSmall + "lr: 1\n",
             "17:1: error: lr: ",
             {"unknown key", "'optimizer.lr'"}},
        Case{"unknown_item",
             replaced(kSmall, "{path: corpus/train}", "{path: a, wieght: 2}"),
             "12:17: error: data.train[0].wieght: ",
             {"'data.train[0].weight'"}},
        Case{"dotted_key",
             kSmall + "optimizer.eps: 0.5\n",
             "17:1: error: optimizer.eps: unknown key",
             {"nested"}},
        Case{"dotted_twice",
             kSmall + "optimizer.lr: 0.5\n",
             "17:1: error: optimizer.lr: unknown key",
             {"nested"}},
        Case{"indexed_key",
             replaced(kSmall, "data:\n", "data:\n  train[7]: {path: a}\n"),
             "10:3: error: data.train[7]: unknown key",
             {"letters"}},
        Case{"indexed_path",
             replaced(kSmall, "data:\n", "data:\n  \"train[0].path\": a\n"),
             "10:3: error: data.train[0].path: unknown key",
             {"nested"}},
        Case{"empty_key", kSmall + "\"\": 3\n", "17:1: error: '': unknown key", {"letters"}},
        Case{"anchor", with_lr("&rate 0.001"), "16:7: error: optimizer.lr: ", {"an anchor"}},
        Case{"alias",
             replaced(with_lr("&r 0.001"), "optimizer:\n", "optimizer:\n  eps: 1.0e-8\n") +
                 "  weight_decay: *r\n",
             "17:7: error: optimizer.lr: ",
             {"an anchor", "18:17: error: optimizer.weight_decay: got an alias"},
             2},
        Case{"self_alias",
             kSmall + "eval: &e [*e]\n",
             "17:7: error: eval: ",
             {"an anchor", "17:11: error: eval[0]: got an alias", "section"},
             3},
        Case{"alias_bomb", bomb(), "17:1: error: a0: ", {"an anchor"}, 0},
        Case{"merge_key",
             kSmall + "eval:\n  <<: {samples: 3}\n",
             "18:3: error: eval.<<: ",
             {"merge key"}},
        Case{"tag", with_lr("!!float 0.001"), "16:7: error: optimizer.lr: ", {"the tag"}},
        Case{"tag_map", kSmall + "eval: !!map {samples: 3}\n", "17:7: error: eval: ", {"the tag"}},
        Case{"null", with_lr("null"), "16:7: error: optimizer.lr: ", {"null"}},
        Case{"tilde", with_lr("~"), "16:7: error: optimizer.lr: ", {"null"}},
        Case{"empty_value",
             with_lr(""),
             "16:3: error: optimizer.lr: ",
             {"null", "leave the key out"}},
        Case{"empty_flow", kSmall + "eval: {samples}\n", "17:15: error: eval.samples: ", {"null"}},
        Case{"empty_item",
             kSmall + "parallel: {pipeline: {split: [1, ~]}}\n",
             "17:34: error: parallel.pipeline.split[1]: ",
             {"null"}},
        Case{"empty_section", kSmall + "eval:\n", "17:1: error: eval: ", {"null"}},
        Case{"null_key", kSmall + "eval: {~: 3}\n", "17:8: error: eval: ", {"empty key"}},
        Case{"map_as_key", kSmall + "? {a: 1}\n: 2\n", "17:3: error: ", {"as key"}},
        Case{"list_as_key", kSmall + "eval: {[a]: 2}\n", "17:8: error: eval: ", {"as key"}}));

INSTANTIATE_TEST_SUITE_P(
    Numbers, StrictYaml,
    testing::Values(
        Case{"octal", with_steps("010"), "2:27: error: run.steps: ", {"got 010", "octal"}},
        Case{"octal_double", with_lr("010"), "16:7: error: optimizer.lr: ", {"got 010", "octal"}},
        Case{"underscore",
             with_steps("1_000"),
             "2:27: error: run.steps: ",
             {"1_000", "underscores"}},
        Case{
            "hexadecimal", with_steps("0x10"), "2:27: error: run.steps: ", {"0x10", "hexadecimal"}},
        Case{"octal_0o", with_steps("0o10"), "2:27: error: run.steps: ", {"0o10", "octal"}},
        Case{"binary", with_steps("0b10"), "2:27: error: run.steps: ", {"0b10", "binary"}},
        Case{"inf", with_lr(".inf"), "16:7: error: optimizer.lr: ", {"got .inf", "finite"}},
        Case{"minus_inf", with_lr("-.INF"), "16:7: error: optimizer.lr: ", {"finite"}},
        Case{"nan", with_lr(".nan"), "16:7: error: optimizer.lr: ", {"finite"}},
        Case{"overflow", with_lr("1e400"), "16:7: error: optimizer.lr: ", {"got 1e400", "double"}},
        Case{"underflow", with_lr("1e-400"), "16:7: error: optimizer.lr: ", {"double"}},
        Case{"int_overflow",
             with_steps("9223372036854775808"),
             "2:27: error: run.steps: ",
             {"64 bits"}},
        Case{"plus", with_steps("+5"), "2:27: error: run.steps: ", {"'+'"}},
        Case{"no_digit_left", with_lr(".5"), "16:7: error: optimizer.lr: ", {"both sides"}},
        Case{"no_digit_right", with_lr("5."), "16:7: error: optimizer.lr: ", {"both sides"}},
        Case{"fraction", with_steps("10.0"), "2:27: error: run.steps: ", {"10.0", "digits alone"}},
        Case{"exponent", with_steps("1e3"), "2:27: error: run.steps: ", {"1e3", "digits alone"}},
        Case{"base_60", with_steps("\"1:30\""), "2:27: error: run.steps: ", {"quotes"}},
        Case{"base_60_plain", with_lr("1:30"), "16:7: error: optimizer.lr: ", {"base 60"}},
        Case{"suffix", with_steps("10k"), "2:27: error: run.steps: ", {"suffix"}},
        Case{"quoted", with_steps("\"10\""), "2:27: error: run.steps: ", {"'10'", "quotes"}},
        Case{"word", with_steps("ten"), "2:27: error: run.steps: ", {"'ten'", "an integer"}},
        Case{
            "negative_lr", with_lr("-0.1"), "16:7: error: optimizer.lr: ", {"got -0.1", "above 0"}},
        Case{"zero_steps", with_steps("0"), "2:27: error: run.steps: ", {"got 0", "1 to 10^12"}}));

INSTANTIATE_TEST_SUITE_P(
    Types, StrictYaml,
    testing::Values(
        Case{"bool_yes",
             kSmall + "metrics: {tensorboard: yes}\n",
             "17:24: error: metrics.tensorboard: ",
             {"true or false"}},
        Case{"bool_on", kSmall + "metrics: {tensorboard: on}\n", "17:24: error: ", {"spellings"}},
        Case{"bool_off", kSmall + "metrics: {tensorboard: Off}\n", "17:24: error: ", {"spellings"}},
        Case{"bool_no", kSmall + "metrics: {tensorboard: no}\n", "17:24: error: ", {"spellings"}},
        Case{"bool_True",
             kSmall + "metrics: {tensorboard: True}\n",
             "17:24: error: ",
             {"spellings"}},
        Case{"bool_int",
             kSmall + "metrics: {tensorboard: 1}\n",
             "17:24: error: ",
             {"got 1", "true or false"}},
        Case{"bool_quoted",
             kSmall + "metrics: {tensorboard: \"true\"}\n",
             "17:24: error: ",
             {"quotes"}},
        Case{"text_int",
             replaced(kSmall, "name: small", "name: 12"),
             "2:13: error: run.name: ",
             {"got 12", "put it in quotes"}},
        Case{"text_bool",
             replaced(kSmall, "name: small", "name: true"),
             "2:13: error: run.name: ",
             {"quotes"}},
        Case{"text_empty",
             replaced(kSmall, "name: small", "name: \"\""),
             "2:13: error: run.name: ",
             {"empty"}},
        Case{"text_break",
             replaced(kSmall, "corpus/train", "\"a\\nb\""),
             "12:14: error: data.train[0].path: ",
             {"line break"}},
        Case{"text_list",
             replaced(kSmall, "name: small", "name: [a]"),
             "2:13: error: run.name: ",
             {"a list of 1"}},
        Case{"name_slash",
             replaced(kSmall, "name: small", "name: a/b"),
             "2:13: error: run.name: ",
             {"a-z 0-9"}},
        Case{"name_dots",
             replaced(kSmall, "name: small", "name: .."),
             "2:13: error: run.name: ",
             {"'..'"}},
        Case{"section_scalar",
             replaced(kSmall, "batch: {global_samples: 4, micro_samples: 2, sequence_length: 16}",
                      "batch: 4"),
             "14:8: error: batch: ",
             {"got 4", "section"}},
        Case{"section_list", kSmall + "eval: [3]\n", "17:7: error: eval: ", {"a list of 1"}},
        Case{
            "key_map", with_lr("{a: 1}"), "16:7: error: optimizer.lr: ", {"got a map", "a number"}},
        Case{"key_list", with_lr("[1]"), "16:7: error: optimizer.lr: ", {"got a list of 1"}},
        Case{"betas_scalar",
             kSmall + "  betas: 0.9\n",
             "17:10: error: optimizer.betas: ",
             {"list of 2"}},
        Case{"betas_three",
             kSmall + "  betas: [0.1, 0.2, 0.3]\n",
             "17:10: error: optimizer.betas: ",
             {"list of 3"}},
        Case{"betas_range",
             kSmall + "  betas: [0.9, 1.0]\n",
             "17:10: error: optimizer.betas: ",
             {"[0, 1)"}},
        Case{"betas_text",
             kSmall + "  betas: [0.9, a]\n",
             "17:16: error: optimizer.betas: ",
             {"'a'"}},
        Case{"train_map",
             replaced(kSmall, "    - {path: corpus/train}\n", "    path: corpus/train\n"),
             "12:5: error: data.train: ",
             {"got a map", "list of maps"}},
        Case{"train_empty",
             replaced(kSmall, "train:\n    - {path: corpus/train}\n", "train: []\n"),
             "11:10: error: data.train: ",
             {"empty list", "at least one"}},
        Case{"train_text",
             replaced(kSmall, "- {path: corpus/train}", "- corpus/train"),
             "12:7: error: data.train[0]: ",
             {"'corpus/train'"}},
        Case{"train_no_path",
             replaced(kSmall, "- {path: corpus/train}", "- {weight: 2}"),
             "12:7: error: data.train[0].path: ",
             {"required"}},
        Case{"version_two",
             replaced(kSmall, "version: 1", "version: 2"),
             "1:10: error: version: ",
             {"got 2, need 1"}},
        Case{"version_missing",
             replaced(kSmall, "version: 1\n", ""),
             "1:1: error: version: ",
             {"version: 1"}},
        Case{"lr_missing",
             replaced(kSmall, "  lr: 0.001\n", "  eps: 1.0e-8\n"),
             "15:1: error: optimizer.lr: ",
             {"required"}},
        Case{"optimizer_missing",
             replaced(kSmall, "optimizer:\n  lr: 0.001\n", ""),
             "1:1: error: optimizer.lr: ",
             {"required"}}));

TEST(StrictYamlLimits, AliasBomb_IsRefusedAtOnceAndAtMostFiftyAreShown) {
  try {
    (void)parse(bomb());
    FAIL();
  } catch (const RecipeError& error) {
    const std::string text = error.what();
    EXPECT_GT(error.problems().size(), 90U);
    EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 51);
    EXPECT_THAT(text, HasSubstr("... and "));
    EXPECT_EQ(error.exit_code(), 2);
  }
}

TEST(StrictYamlLimits, NodeBudget_StopsALongList) {
  std::string text = kSmall + "deep: [";
  for (int i = 0; i < 100001; ++i) text += "1,";
  EXPECT_THAT(complaint_of(text + "]\n"),
              AllOf(StartsWith("17:"), HasSubstr("more than 100,000 values")));
}

TEST(StrictYamlLimits, BigFile_IsNotParsed) {
  EXPECT_THAT(complaint_of(kSmall + "# " + std::string(size_t{5} << 20, 'x') + "\n"),
              AllOf(StartsWith("1:1: "), HasSubstr("at most 1")));
}

TEST(StrictYaml, LegalSpellings_AreAccepted) {
  EXPECT_EQ(problems_of("--- # header\n" + kSmall + "...\n").size(), 0U);
  EXPECT_EQ(parse(with_lr("1e-3")).recipe.optimizer.lr, 1e-3);
  EXPECT_EQ(parse(with_lr("5")).recipe.optimizer.lr, 5.0);
  EXPECT_EQ(parse(with_lr("2.5E+2")).recipe.optimizer.lr, 250.0);
  EXPECT_EQ(parse(replaced(kSmall, "name: small", "name: \"12\"")).recipe.run.name, "12");
  std::string windows;
  for (char c : kSmall + "# tab\tin a comment\n") windows += c == '\n' ? "\r\n" : std::string(1, c);
  EXPECT_EQ(dump_recipe(parse(windows), false), dump_recipe(parse(kSmall), false));
}

TEST(RecipeProblems, AllAreReportedAtOnceInOrderOfLines) {
  const std::string text = replaced(replaced(with_lr("-1"), "hidden_size: 32", "hidden_size: yes"),
                                    "steps: 10", "stepz: 10");
  try {
    (void)parse(text, Overrides{"eval.sample=3"});
    FAIL();
  } catch (const RecipeError& error) {
    const std::string file = kFile + ":";
    EXPECT_EQ(std::string(error.what()),
              file +
                  "2:20: error: run.stepz: unknown key ('run' has no such key). Perhaps "
                  "'run.steps' was meant.\n" +
                  file + "5:16: error: model.hidden_size: got yes, need an integer, 1 to 2^20.\n" +
                  file +
                  "16:7: error: optimizer.lr: got -1, need a number, above 0.\n"
                  "--set:1:1: error: eval.sample: unknown key ('eval' has no such key). Perhaps "
                  "'eval.samples' was "
                  "meant.\n4 problems; nothing was started");
    EXPECT_STREQ(error.class_name(), "RecipeError");
  }
}

}  // namespace
}  // namespace capstan::recipe
