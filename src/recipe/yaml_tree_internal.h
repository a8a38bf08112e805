// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A YAML text as a plain tree with the place of every node. Built from the parser's events, so
// aliases are never followed and depth and size are bounded while reading. What is only legal YAML,
// not legal in a recipe (anchors, tags, null, duplicate keys, merge keys), is reported and leaves a
// broken node behind.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "capstan/recipe/load.h"

namespace capstan::recipe {

inline constexpr int kMaxDepth = 64;
inline constexpr int64_t kMaxNodes = 100000;
inline constexpr int64_t kMaxFileBytes = int64_t{1} << 20;

struct Entry;
struct Node {
  enum class Kind { kScalar, kMap, kList, kBroken };  // broken: already reported
  Kind kind = Kind::kScalar;
  std::string text;    // of a scalar
  bool plain = true;   // a scalar without quotes
  bool block = false;  // a map or list written by indentation
  Origin origin;
  std::vector<Entry> entries;  // of a map, in order
  std::vector<Node> items;     // of a list

  [[nodiscard]] Node* find(const std::string& key);
  [[nodiscard]] const Entry* find_entry(const std::string& key) const;
};
struct Entry {
  std::string key;
  Origin origin;
  Node value;
};

// Where one text comes from. With `fixed` every place in it is `start` (the overrides of the
// command line).
struct Source {
  Origin start;
  bool fixed = false;
};

// What a reading shares over all files.
struct Reading {
  std::vector<Problem> problems;
  int64_t nodes_left = kMaxNodes;
  bool lacks_a_file =
      false;  // an include was refused: what is missing and how keys agree is not judged
};

// Throws RecipeError with one problem for a bad encoding, a syntax error or a limit.
[[nodiscard]] Node parse_yaml(const std::string& text, const Source& source, Reading& reading,
                              const std::string& root_path = "");

// Key text from a file, fit for a message.
[[nodiscard]] std::string shown_key(std::string_view key);
[[nodiscard]] std::string join_path(std::string_view section, std::string_view key);

}  // namespace capstan::recipe
