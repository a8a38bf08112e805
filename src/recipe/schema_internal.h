// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The key table. One entry per recipe key says everything about it: where it lives in the structs
// (type and default follow from that), range, values, words, what may change at a resume, meaning.
// Loading, validation, dump, JSON Schema, docs and comparison walk this table and know no key by
// name.
#pragma once
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "capstan/recipe/recipe.h"
#include "capstan/recipe/values.h"

namespace capstan::recipe {

// The struct field of a key.
using Field =
    std::variant<int64_t*, double*, bool*, std::string*, std::optional<int64_t>*,
                 std::optional<double>*, std::optional<std::string>*, std::vector<double>*,
                 std::vector<std::string>*, std::optional<std::vector<int64_t>>*,
                 std::vector<TrainSource>*, std::vector<ValidationSource>*>;
// `index` picks the item for keys inside a list of maps ("data.train[].path") and is ignored by
// others.
using FieldOf = Field (*)(Recipe& recipe, size_t index);

enum class Type {
  kInteger,
  kNumber,
  kBoolean,
  kText,
  kIntegerList,
  kNumberList,
  kTextList,
  kMapList
};

// A value apart from its field. monostate: the key's word (auto, none, ...). A list of maps is its
// size.
using Value = std::variant<std::monostate, int64_t, double, bool, std::string, std::vector<int64_t>,
                           std::vector<double>, std::vector<std::string>>;

struct Range {
  double low = -std::numeric_limits<double>::infinity();
  double high = std::numeric_limits<double>::infinity();
  bool low_open = false, high_open = false;
  [[nodiscard]] bool contains(double value) const;
  [[nodiscard]] bool is_bounded() const;
  [[nodiscard]] std::string text() const;  // "at least 1", "1 to 4096", "above 0", "in [0, 1)"
};

class Key {
 public:
  Key(const char* path_text, FieldOf field_function, const char* doc_text);

  Key&& required() &&;
  Key&& word(const char* text) &&;  // stands for "no value" of an optional field
  Key&& range(double low, double high) &&;
  Key&& at_least(double low) &&;
  Key&& above(double low) &&;
  Key&& half_open(double low, double high) &&;
  Key&& choice() &&;                 // values from choice_keys()
  Key&& count(size_t n) &&;          // exact length of a list
  Key&& at_least_one() &&;           // a list that must not be empty
  Key&& name(bool upper_case) &&;    // letters, digits, '.', '_', '-'; 1 to 64 characters
  Key&& unit(const char* text) &&;   // "tokens", "s", "MiB"
  Key&& free() &&;                   // may change at a resume
  Key&& later(const char* what) &&;  // only the default passes; `what` is not in this build

  std::string path;  // "optimizer.lr", "data.train[].weight"
  FieldOf field;
  std::string doc;
  Type type = Type::kText;
  std::string word_text, unit_text, later_feature;
  Range bounds;
  bool is_required = false, is_choice = false, is_free = false;
  bool is_name = false, allows_upper_case = false;
  std::optional<size_t> exact_count;
  size_t least_count = 0;
};

[[nodiscard]] const std::vector<Key>& keys();
// One level of a path: letters, digits, '_'. Other keys of a file must not be joined into a path.
[[nodiscard]] bool is_key_name(std::string_view text);
[[nodiscard]] const Key* find_key(std::string_view pattern);  // "data.train[].weight"
[[nodiscard]] bool is_section(std::string_view pattern);      // "optimizer", "optimizer.spike_skip"
[[nodiscard]] std::vector<std::string> children(std::string_view section);  // names directly below
[[nodiscard]] bool is_item_key(const Key& key);                             // inside a list of maps
[[nodiscard]] std::string list_of(const Key& item_key);    // "data.train[].path" -> "data.train"
[[nodiscard]] std::string leaf_of(std::string_view path);  // "optimizer.lr" -> "lr"
[[nodiscard]] std::string pattern_of(
    std::string_view path);  // "data.train[3].path" -> "data.train[].path"
[[nodiscard]] std::string path_of(const Key& key, size_t index);  // the reverse
[[nodiscard]] size_t instances(const Key& key,
                               const Recipe& recipe);  // 1, or the length of its list

[[nodiscard]] Value get_value(const Key& key, const Recipe& recipe, size_t index = 0);
void set_value(const Key& key, Recipe& recipe, size_t index, const Value& value);
[[nodiscard]] Value default_value(const Key& key);
// As written in YAML: 3, 0.001, true, quickstart, "a b", [0.9, 0.95], auto.
[[nodiscard]] std::string format_value(const Key& key, const Value& value);
// What the key takes, for people: "an integer, at least 1, or auto".
[[nodiscard]] std::string need_text(const Key& key);

}  // namespace capstan::recipe
