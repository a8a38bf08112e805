// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "recipe/overrides_internal.h"

#include <fmt/format.h>

#include <charconv>
#include <optional>
#include <string_view>
#include <unordered_map>

#include "capstan/base/text.h"
#include "recipe/schema_internal.h"
#include "recipe/unknown_key_internal.h"

namespace capstan::recipe {
namespace {

struct Step {
  std::string name;             // a key, or
  std::optional<size_t> index;  // a place in a list
};

// "data.train[0].weight" as steps; nullopt when it is not of that form.
std::optional<std::vector<Step>> parse_path(std::string_view text) {
  std::vector<Step> steps;
  size_t at = 0;
  while (at < text.size()) {
    if (text[at] == '[') {
      const size_t end = text.find(']', at);
      size_t index = 0;
      if (steps.empty() || end == std::string_view::npos) return std::nullopt;
      const auto [stop, error] = std::from_chars(text.data() + at + 1, text.data() + end, index);
      if (error != std::errc() || stop != text.data() + end) return std::nullopt;
      steps.push_back({"", index});
      at = end + 1;
      continue;
    }
    if (!steps.empty()) {
      if (text[at] != '.') return std::nullopt;
      ++at;
    }
    const size_t start = at;
    while (at < text.size() && is_key_name(text.substr(at, 1))) ++at;
    if (at == start) return std::nullopt;
    steps.push_back({std::string(text.substr(start, at - start)), std::nullopt});
  }
  if (steps.empty() || steps.size() > kMaxDepth) return std::nullopt;
  return steps;
}

Node empty_map(const Origin& origin) {
  Node node;
  node.kind = Node::Kind::kMap;
  node.origin = origin;
  return node;
}

// Goes down to the node of `steps`, making maps on the way; nullptr when something else stands
// there, which the check of the tree reports, or when an index is outside its list, which is
// reported here.
class Descent {
 public:
  Descent(const Origin& origin, const std::string& path, Reading& reading)
      : origin_(origin), path_(path), reading_(reading) {}

  Node* go(Node* node, const Step& step) {
    return step.index ? item(node, *step.index) : child(node, step.name);
  }

 private:
  Node* child(Node* node, const std::string& name) {
    if (node->kind != Node::Kind::kMap) return nullptr;
    if (Node* found = node->find(name)) return found;
    node->entries.push_back({name, origin_, empty_map(origin_)});
    return &node->entries.back().value;
  }

  Node* item(Node* node, size_t index) {
    if (node->kind == Node::Kind::kList && index < node->items.size()) return &node->items[index];
    const size_t size = node->items.size();
    if (node->kind != Node::Kind::kList) node->kind = Node::Kind::kBroken;
    reading_.problems.push_back({origin_, path_, fmt::format("index {}", index),
                                 fmt::format("an item of the list, which has {}", size),
                                 "--set changes items and cannot add them", "Set the whole list"});
    return nullptr;
  }

  const Origin& origin_;
  const std::string& path_;
  Reading& reading_;
};

// True when the schema has this key or section; reports it otherwise.
bool check_known(const std::string& path, const Origin& origin, Reading& reading) {
  const std::string pattern = pattern_of(path);
  const bool is_item = pattern.ends_with("[]") && find_key(pattern.substr(0, pattern.size() - 2));
  if (pattern == "include") {
    reading.problems.push_back({origin, path, "an override", "a key of the recipe itself",
                                "files are read before overrides", "Write it into the file"});
    return false;
  }
  if (find_key(pattern) != nullptr || is_section(pattern) || is_item) return true;
  reading.problems.push_back(unknown_key_problem(path, origin, probable_key(path)));
  return false;
}

bool has_block_style(const Node& node) {
  return (node.kind == Node::Kind::kMap || node.kind == Node::Kind::kList) && node.block;
}

}  // namespace

void merge_into(Node& base, Node top) {
  if (base.kind != Node::Kind::kMap || top.kind != Node::Kind::kMap) {
    base = std::move(top);
    return;
  }
  std::unordered_map<std::string, size_t> place;
  for (size_t i = 0; i < base.entries.size(); ++i) place.emplace(base.entries[i].key, i);
  for (Entry& entry : top.entries) {
    const auto found = place.find(entry.key);
    if (found != place.end()) {
      merge_into(base.entries[found->second].value, std::move(entry.value));
    } else {
      base.entries.push_back(std::move(entry));
    }
  }
}

void apply_override(Node& root, const std::string& text, int number, Reading& reading) {
  const Origin origin{"--set", number, 1};
  const size_t equals = text.find('=');
  const auto steps = parse_path(std::string_view(text).substr(0, equals));
  if (equals == std::string::npos || !steps) {
    reading.problems.push_back({origin, "", quote(text),
                                "KEY=VALUE with a key like optimizer.lr or "
                                "data.train[0].weight",
                                "", ""});
    return;
  }
  const std::string path = text.substr(0, equals);
  if (!check_known(path, origin, reading)) return;
  const size_t problems_before = reading.problems.size();
  Node value = parse_yaml(text.substr(equals + 1), {origin, true}, reading, path);
  if (reading.problems.size() == problems_before && has_block_style(value)) {
    reading.problems.push_back({origin, path, "a map or list in block form",
                                "one value, [..] or {..}", "--set takes a single line", ""});
  }
  Descent descent(origin, path, reading);
  Node* place = &root;
  for (const Step& step : *steps) {
    place = descent.go(place, step);
    if (place == nullptr) return;
  }
  merge_into(*place, std::move(value));
}

}  // namespace capstan::recipe
