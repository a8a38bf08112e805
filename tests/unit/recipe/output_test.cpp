// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What is written from a recipe and from the key table: dump, identity, JSON Schema, documentation.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "recipe/schema_internal.h"
#include "recipe_text.h"

namespace capstan::recipe {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

std::string read(const fs::path& path) {
  std::ostringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}
const fs::path kConfigs = fs::path(CAPSTAN_SOURCE_DIR) / "configs";

void expect_round_trip(const Resolved& resolved) {
  for (bool with_origins : {false, true}) {
    const Resolved again = parse_recipe(dump_recipe(resolved, with_origins), "dump.yaml");
    EXPECT_THAT(compare_recipes(resolved.recipe, again.recipe), testing::IsEmpty());
    EXPECT_EQ(dump_recipe(again.recipe), dump_recipe(resolved.recipe));
    EXPECT_EQ(identity_hash(again.recipe), identity_hash(resolved.recipe));
  }
}

TEST(Dump, ParsesToItself) {
  expect_round_trip(load_recipe(kConfigs / "quickstart.yaml"));
  expect_round_trip(load_recipe(kConfigs / "debug" / "tiny.yaml"));
  expect_round_trip(parse(kSmall));
  expect_round_trip(parse(kSmall, Overrides{"data.validation=[]"}));
  expect_round_trip(
      parse(kSmall, Overrides{"precision.compute=fp64", "optimizer.max_grad_norm=none",
                              "eval.samples=all", "run.steps=none", "run.tokens=1000000000000000",
                              "optimizer.eps=2.2250738585072014e-308", "optimizer.lr=0.1",
                              "run.start_timeout_s=1.7976931348623157e308"}));
}

TEST(Dump, RestoresEveryText) {
  for (const char* text : {"a b",
                           "a: b",
                           "# no comment",
                           "it's",
                           "\"quoted\"",
                           "back\\slash",
                           "true",
                           "010",
                           "~",
                           "null",
                           "1e3",
                           ".inf",
                           "- a",
                           "[a]",
                           "{a}",
                           "&a",
                           "*a",
                           "!a",
                           "|",
                           ">",
                           "%a",
                           "@a",
                           "`a",
                           " lead",
                           "trail ",
                           "ü/日本/🙂",
                           "a#b",
                           "a,b",
                           "...",
                           "---",
                           "?",
                           "=",
                           "<<",
                           "1:30",
                           "\u2028",
                           "\u0085",
                           "\uFEFFmark",
                           "C:\\x"}) {
    Resolved resolved = parse(kSmall);
    resolved.recipe.data.train[0].path = text;
    resolved.recipe.run.directory = text;
    SCOPED_TRACE(text);
    expect_round_trip(resolved);
  }
}

TEST(Dump, ShowsEveryKeyWithItsOrigin) {
  const Resolved resolved = parse(kSmall, Overrides{"run.seed=3"});
  const std::string text = dump_recipe(resolved, true);
  EXPECT_THAT(text, HasSubstr("  seed: 3"));
  for (const Key& key : keys()) {
    EXPECT_THAT(text, HasSubstr(leaf_of(key.path) + ":"));
    for (size_t i = 0; i < instances(key, resolved.recipe); ++i) {
      EXPECT_TRUE(resolved.origins.contains(path_of(key, i))) << path_of(key, i);
    }
  }
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const bool is_value = !line.ends_with(":") && line != "include: []";
    EXPECT_EQ(line.find("  # ") != std::string::npos, is_value) << line;
  }
  EXPECT_THAT(text, testing::ContainsRegex("seed: 3 +# --set:1:1\n"));
  EXPECT_THAT(text, testing::ContainsRegex("lr: 0.001 +# no-such-folder/test.yaml:16:7\n"));
  EXPECT_THAT(text, testing::ContainsRegex("eps: 1.0e-08 +# default\n"));
}

TEST(Dump, HostileFileName_StaysInTheComment) {
  const Resolved resolved = parse_recipe(kSmall, "no-such\n  evil: 1\n.yaml");
  EXPECT_EQ(dump_recipe(parse(dump_recipe(resolved, true)).recipe), dump_recipe(resolved.recipe));
}

TEST(Compare, NamesEveryDifference) {
  const Recipe before = parse(kSmall).recipe;
  const Recipe after = parse(kSmall, Overrides{"run.steps=11", "optimizer.lr=0.5",
                                               "data.train=[{path: corpus/train}, {path: b}]"})
                           .recipe;
  const auto differences = compare_recipes(before, after);
  ASSERT_EQ(differences.size(), 5U);
  EXPECT_EQ(differences[0].key, "run.steps");
  EXPECT_TRUE(differences[0].free_at_resume);
  EXPECT_EQ(differences[1].key, "data.train");
  EXPECT_EQ(differences[2].key, "data.train[1].path");
  EXPECT_EQ(differences[2].before, "(none)");
  EXPECT_EQ(differences[2].after, "b");
  EXPECT_EQ(differences[4].key, "optimizer.lr");
  EXPECT_EQ(differences[4].before, "0.001");
  EXPECT_EQ(differences[4].after, "0.5");
  EXPECT_FALSE(differences[4].free_at_resume);
}

TEST(Identity, IgnoresWhatIsFreeAtAResume) {
  const std::string identity = identity_hash(parse(kSmall).recipe);
  EXPECT_EQ(identity.size(), 32U);
  EXPECT_EQ(identity, identity_hash(parse(kSmall, Overrides{"run.steps=99", "batch.micro_samples=4",
                                                            "eval.samples=all", "parallel.data=2",
                                                            "run.threads=3"})
                                        .recipe));
  EXPECT_NE(identity, identity_hash(parse(kSmall, Overrides{"run.seed=5"}).recipe));
}

TEST(Schema, HasEveryKeyWithDescription) {
  const auto schema = nlohmann::json::parse(json_schema());
  EXPECT_EQ(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
  for (const Key& key : keys()) {
    const nlohmann::json* at = &schema;
    std::istringstream parts(key.path);
    for (std::string part; std::getline(parts, part, '.');) {
      EXPECT_EQ((*at)["additionalProperties"], false);
      const bool is_list = part.ends_with("[]");
      at = &(*at)["properties"][is_list ? part.substr(0, part.size() - 2) : part];
      if (is_list) at = &(*at)["items"];
    }
    EXPECT_EQ((*at)["description"], key.doc) << key.path;
    EXPECT_EQ(at->contains("default"), !key.is_required) << key.path;
  }
  EXPECT_EQ(schema["properties"]["run"]["properties"]["seed"]["default"], 1234);
  EXPECT_THAT(schema["properties"]["run"]["required"], testing::ElementsAre("name"));
}

// Uses an independent implementation where the machine has one.
TEST(Schema, AcceptsAndRefusesWithAnotherValidator) {
  if (std::system("python3 -c 'import jsonschema, yaml' 2>/dev/null") != 0) {
    GTEST_SKIP() << "python3 has no jsonschema and yaml";
  }
  const fs::path folder =
      fs::temp_directory_path() / ("capstan-schema-" + std::to_string(getpid()));
  fs::create_directories(folder);
  std::ofstream(folder / "schema.json") << json_schema();
  std::ofstream(folder / "dump.yaml") << dump_recipe(parse(kSmall), true);
  std::ofstream(folder / "check.py") << R"(
import copy, json, pathlib, sys, jsonschema, yaml
folder = pathlib.Path(sys.argv[1])
schema = json.loads((folder / "schema.json").read_text())
jsonschema.Draft202012Validator.check_schema(schema)
validator = jsonschema.Draft202012Validator(schema)
files = sys.argv[2:] + [str(folder / "dump.yaml")]
good = [yaml.safe_load(pathlib.Path(p).read_text()) for p in files]
for recipe in good:
    validator.validate(recipe)
def refused(section, key, value):
    bad = copy.deepcopy(good[0])
    bad.setdefault(section, {})[key] = value
    assert list(validator.iter_errors(bad)), (section, key, value)
refused("optimizer", "lr", -1.0)
refused("optimizer", "lr", "fast")
refused("optimizer", "betas", [0.9])
refused("optimizer", "betas", [0.9, 1.0])
refused("optimizer", "name", "muon")
refused("optimizer", "lrr", 1.0)
refused("run", "name", "A b")
refused("run", "steps", 0)
refused("run", "threads", "many")
refused("parallel", "tensor", 0)
refused("data", "train", [])
refused("data", "train", [{"weight": 1.0}])
)";
  const std::string command = "python3 '" + (folder / "check.py").string() + "' '" +
                              folder.string() + "' '" + (kConfigs / "quickstart.yaml").string() +
                              "' '" + (kConfigs / "debug" / "tiny.yaml").string() + "'";
  EXPECT_EQ(std::system(command.c_str()), 0);
  fs::remove_all(folder);
}

TEST(Documentation, IsCurrent) {
  EXPECT_EQ(read(fs::path(CAPSTAN_SOURCE_DIR) / "docs" / "recipes.md"), markdown_reference())
      << "write it anew: capstan recipe schema --markdown > docs/recipes.md";
}

TEST(Documentation, NamesEveryKeyAndLaterValue) {
  const std::string text = markdown_reference();
  for (const Key& key : keys()) EXPECT_THAT(text, HasSubstr("| `" + key.path + "` |"));
  for (const ChoiceKey& choice : choice_keys()) {
    for (const std::string& value : choice.known) EXPECT_THAT(text, HasSubstr("`" + value + "`"));
  }
}

}  // namespace
}  // namespace capstan::recipe
