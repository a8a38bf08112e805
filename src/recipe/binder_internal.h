// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// From the tree to the structs: every key on its own, by the key table.
#pragma once
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "recipe/schema_internal.h"
#include "recipe/yaml_tree_internal.h"

namespace capstan::recipe {

class Binder {
 public:
  Binder(Resolved& resolved, Reading& reading)
      : resolved_(resolved), problems_(reading.problems), lacks_a_file_(reading.lacks_a_file) {}

  void bind(const Node& root);
  // False for a key (with indexes) whose value is missing or was refused; rules between keys skip
  // it.
  [[nodiscard]] bool is_good(const std::string& path) const { return !is_bad_or_below_bad(path); }
  // Where a section or list item starts; the file when it does not exist.
  [[nodiscard]] Origin section_origin(std::string path) const;

 private:
  void bind_map(const Node& map, const std::string& section, size_t index);
  void bind_key(const Key& key, const Node& node, const std::string& path, size_t index);
  void bind_items(const Key& key, const Node& node, const std::string& path);
  void fill(const Key& key, size_t index);
  void refuse(const std::string& path, const Origin& origin, std::string got, const Key& key,
              std::string why);
  [[nodiscard]] bool is_bad_or_below_bad(std::string path) const;

  Resolved& resolved_;
  std::vector<Problem>& problems_;
  bool lacks_a_file_;  // missing keys are then not reported
  std::set<std::string> bad_;
  std::map<std::string, Origin> sections_;
};

// The value of a node for a key, or what is wrong with it.
struct ValueFault {
  Origin origin;
  std::string got, why;
  bool silent = false;  // already reported
};
[[nodiscard]] std::variant<Value, ValueFault> read_value(const Key& key, const Node& node);
// What stands in a node, for messages: 3, 'abc', a map, a list of 2.
[[nodiscard]] std::string shown_node(const Node& node);

}  // namespace capstan::recipe
