// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "recipe/binder_internal.h"

#include <fmt/format.h>

#include "recipe/check_value_internal.h"
#include "recipe/unknown_key_internal.h"

namespace capstan::recipe {
namespace {

// Looking for the nearest key costs more than reading one; nobody reads past this many.
constexpr size_t kSuggestions = 500;

// "a.b[0].c" -> "a.b[0]" -> "a.b" -> "a" -> "".
std::string parent_of(const std::string& path) {
  const size_t end = path.find_last_of(".[");
  return end == std::string::npos ? "" : path.substr(0, end);
}

// `optimizer.lr: 1` is a key with a dot in its name, not a way into a section.
Problem odd_key_problem(const Entry& entry, const std::string& path) {
  const bool has_dot = entry.key.find('.') != std::string::npos;
  return {entry.origin,
          path,
          "unknown key",
          "",
          has_dot ? "in a file, sections are nested and not joined by dots"
                  : "names have letters, digits and '_'",
          ""};
}

}  // namespace

void Binder::bind(const Node& root) {
  sections_[""] = root.origin;
  bind_map(root, "", 0);
  for (const Key& key : keys()) {
    for (size_t i = 0; i < instances(key, resolved_.recipe); ++i) fill(key, i);
  }
}

Origin Binder::section_origin(std::string path) const {
  while (true) {
    const auto found = sections_.find(path);
    if (found != sections_.end() || path.empty()) return found->second;
    path = parent_of(path);
  }
}

bool Binder::is_bad_or_below_bad(std::string path) const {
  for (; !path.empty(); path = parent_of(path)) {
    if (bad_.contains(path)) return true;
  }
  return bad_.contains("");
}

void Binder::bind_map(const Node& map, const std::string& section, size_t index) {
  if (map.kind != Node::Kind::kMap) {
    bad_.insert(section);
    if (map.kind != Node::Kind::kBroken) {
      problems_.push_back(
          {map.origin, section, shown_node(map), "a map of keys", "it is a section", ""});
    }
    return;
  }
  for (const Entry& entry : map.entries) {
    const std::string path = join_path(section, entry.key);
    if (!is_key_name(entry.key)) {
      problems_.push_back(odd_key_problem(entry, path));
      continue;
    }
    const std::string pattern = pattern_of(path);
    if (const Key* key = find_key(pattern)) {
      bind_key(*key, entry.value, path, index);
    } else if (is_section(pattern)) {
      sections_[path] = entry.origin;
      bind_map(entry.value, path, index);
    } else {
      const bool is_shown = problems_.size() < kSuggestions;
      const auto probable = is_shown ? probable_key(path) : std::nullopt;
      problems_.push_back(unknown_key_problem(path, entry.origin, probable));
      if (probable) bad_.insert(*probable);  // not reported as missing too
    }
  }
}

void Binder::refuse(const std::string& path, const Origin& origin, std::string got, const Key& key,
                    std::string why) {
  bad_.insert(path);
  problems_.push_back({origin, path, std::move(got), need_text(key), std::move(why), ""});
}

void Binder::bind_key(const Key& key, const Node& node, const std::string& path, size_t index) {
  resolved_.origins[path] = node.origin;
  if (key.type == Type::kMapList) return bind_items(key, node, path);
  const auto result = read_value(key, node);
  if (const auto* fault = std::get_if<ValueFault>(&result)) {
    bad_.insert(path);
    if (!fault->silent) refuse(path, fault->origin, fault->got, key, fault->why);
    return;
  }
  const Value& value = std::get<Value>(result);
  if (auto complaint = check_value(key, value)) {
    bad_.insert(path);
    const bool as_written = node.kind == Node::Kind::kScalar && !complaint->need.empty();
    problems_.push_back({node.origin, path, as_written ? shown_node(node) : complaint->got,
                         complaint->need, complaint->why, complaint->fix});
    return;
  }
  set_value(key, resolved_.recipe, index, value);
}

void Binder::bind_items(const Key& key, const Node& node, const std::string& path) {
  if (node.kind == Node::Kind::kBroken) {
    bad_.insert(path);
    return;
  }
  if (node.kind != Node::Kind::kList || node.items.size() < key.least_count) {
    return refuse(path, node.origin, shown_node(node), key, "");
  }
  set_value(key, resolved_.recipe, 0, static_cast<int64_t>(node.items.size()));
  for (size_t i = 0; i < node.items.size(); ++i) {
    const std::string item = fmt::format("{}[{}]", path, i);
    sections_[item] = node.items[i].origin;
    bind_map(node.items[i], item, i);
  }
}

void Binder::fill(const Key& key, size_t index) {
  const std::string path = path_of(key, index);
  if (resolved_.origins.contains(path)) return;
  resolved_.origins[path] = {"default", 0, 0};
  if (!key.is_required || is_bad_or_below_bad(path)) return;
  bad_.insert(path);
  if (key.path == "version" || lacks_a_file_) return;  // the version is reported for each file
  problems_.push_back({section_origin(path), path, "", need_text(key), "the key is required", ""});
}

}  // namespace capstan::recipe
