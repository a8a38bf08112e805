// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>

#include "capstan/base/text.h"
#include "capstan/recipe/load.h"
#include "recipe/rules_internal.h"
#include "recipe/schema_internal.h"

namespace capstan::recipe {
namespace {

constexpr const char* kIntroduction =
    R"(<!-- SPDX-FileCopyrightText: Capstan contributors -->
<!-- SPDX-License-Identifier: Apache-2.0 -->
<!-- Written by `capstan recipe schema --markdown > docs/recipes.md`; a test keeps it current. -->

# Recipes

A recipe is one YAML file that describes a run. `capstan recipe list` shows those that come with Capstan,
`capstan recipe show NAME` prints one with every default filled in and the place each value comes from,
`capstan recipe validate NAME` checks it without starting anything, and `capstan recipe schema` prints a JSON
Schema for editors. [configs/quickstart.yaml](../configs/quickstart.yaml) is a commented example.

## Format

- UTF-8 without byte-order mark; spaces, no tabs; one document; at most 1 MiB, 100,000 values, 64 levels.
- Numbers are decimal: `3`, `-0.5`, `1.0e-5`. Refused: `010`, `1_000`, `0x10`, `.5`, `+1`, `.inf`, `1e400`. An integer
  is written with digits alone.
- Booleans are `true` and `false`; `yes`, `no`, `on`, `off` are refused.
- Text that another YAML reader could take for a number, a boolean or null needs quotes.
- Not used: null and empty values, anchors, aliases, merge keys, tags, duplicate keys, expansion of environment variables.
- Data and model paths are relative to the working directory; paths in `include` are relative to their file.
- `include: [a.yaml, b.yaml]` reads those files first, in order. Maps merge key by key; lists and single values are
  replaced. At most 8 levels and 64 files; every file has its own `version`.
- `--set KEY=VALUE` on the command line comes last: `--set optimizer.lr=1.0e-3`, `--set "optimizer.betas=[0.9, 0.99]"`,
  `--set data.train[0].weight=2`. The value is read as YAML on a single line.

Every problem of a recipe is reported at once, as `FILE:LINE:COLUMN: error: KEY: got GOT, need NEED (WHY). FIX.`, before
anything starts, with exit code 2. Problems of an override are at `--set:N:1`, N counting the overrides from 1.

Words such as `auto` and `none` stand for a value of their own and are listed with the key. **Resume: free** marks keys
that may change when a run is resumed; other changes are refused unless named by `--allow-change KEY`. Values *of later
builds* are known by name but refused by this one.
)";

std::string type_text(const Key& key) {
  static const char* const kNames[] = {"integer",       "number",           "boolean",
                                       "text",          "list of integers", "list of numbers",
                                       "list of texts", "list of maps"};
  return kNames[static_cast<size_t>(key.type)];
}

std::string code(const std::string& text) { return "`" + text + "`"; }

std::string code_list(const std::vector<std::string>& texts) {
  std::vector<std::string> parts;
  for (const std::string& text : texts) parts.push_back(code(text));
  return join(parts, ", ");
}

std::string default_text(const Key& key) {
  if (key.is_required) return "**required**";
  if (key.type == Type::kMapList) return code("[]");
  return code(format_value(key, default_value(key)));
}

std::string values_text(const Key& key) {
  std::vector<std::string> parts = {type_text(key)};
  if (!key.unit_text.empty()) parts.back() += " (" + key.unit_text + ")";
  if (key.is_choice) {
    const ChoiceKey& choice = *find_choice_key(key.path);
    parts = {(key.type == Type::kTextList ? "list of " : "") + code_list(choice.available)};
    if (!choice.known.empty()) parts.push_back("*of later builds:* " + code_list(choice.known));
  }
  if (key.exact_count) parts.push_back(fmt::format("{} of them", *key.exact_count));
  if (key.least_count > 0) parts.push_back("not empty");
  if (key.is_name)
    parts.push_back(key.allows_upper_case ? "`[A-Za-z0-9._-]{1,64}`" : "`[a-z0-9._-]{1,64}`");
  if (key.bounds.is_bounded()) parts.push_back(key.bounds.text());
  if (!key.word_text.empty()) parts.push_back(code(key.word_text));
  if (!key.later_feature.empty()) {
    parts.push_back("*of later builds:* all but " + code(format_value(key, default_value(key))));
  }
  return join(parts, "; ");
}

std::string row(const Key& key) {
  return fmt::format("| `{}` | {} | {} | {} | {} |\n", key.path, values_text(key),
                     default_text(key), key.is_free ? "free" : "", key.doc);
}

std::string section_of(const Key& key) {
  const size_t dot = key.path.find('.');
  return dot == std::string::npos ? "" : key.path.substr(0, dot);
}

}  // namespace

std::string markdown_reference() {
  std::string text = kIntroduction;
  const std::string head =
      "\n| Key | Values | Default | Resume | Meaning |\n|---|---|---|---|---|\n";
  text += "\n## Top level\n" + head;
  std::string section;
  for (const Key& key : keys()) {
    if (section_of(key) != section) {
      section = section_of(key);
      text += "\n## " + section + "\n" + head;
    }
    text += row(key);
    if (key.path == "version") {
      text += "| `include` | list of files | `[]` |  | Recipes read first, in order. |\n";
    }
  }
  text += "\n## Rules between keys\n\n";
  for (const Rule& rule : rules()) text += fmt::format("- {}\n", rule.text);
  text +=
      "- What depends on the number of ranks is checked by `capstan plan` and at the start of a "
      "run.\n";
  return text;
}

}  // namespace capstan::recipe
