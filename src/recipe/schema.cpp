// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <type_traits>

#include "capstan/base/check.h"
#include "capstan/base/text.h"
#include "recipe/scalar_internal.h"
#include "recipe/schema_internal.h"

namespace capstan::recipe {
namespace {

template <class T>
inline constexpr bool kIsMapList =
    std::is_same_v<T, std::vector<TrainSource>> || std::is_same_v<T, std::vector<ValidationSource>>;

template <class T>
struct Unwrap {
  using Inner = T;
  static constexpr bool kOptional = false;
};
template <class T>
struct Unwrap<std::optional<T>> {
  using Inner = T;
  static constexpr bool kOptional = true;
};

template <class T>
constexpr Type type_of() {
  if constexpr (kIsMapList<T>) return Type::kMapList;
  if constexpr (std::is_same_v<T, int64_t>) return Type::kInteger;
  if constexpr (std::is_same_v<T, double>) return Type::kNumber;
  if constexpr (std::is_same_v<T, bool>) return Type::kBoolean;
  if constexpr (std::is_same_v<T, std::vector<int64_t>>) return Type::kIntegerList;
  if constexpr (std::is_same_v<T, std::vector<double>>) return Type::kNumberList;
  if constexpr (std::is_same_v<T, std::vector<std::string>>) return Type::kTextList;
  return Type::kText;
}

// One item in every list of maps, so that the fields of item keys exist.
Recipe default_recipe() {
  Recipe recipe;
  recipe.data.train.resize(1);
  recipe.data.validation.resize(1);
  return recipe;
}

Field const_field(const Key& key, const Recipe& recipe, size_t index) {
  return key.field(const_cast<Recipe&>(recipe), index);  // only read through
}

// The shortest text that restores the double, always with a point: 10000.0, 1.0e-05.
std::string format_number(double value) {
  std::string text = fmt::format("{}", value);
  if (text.find('.') == std::string::npos) text.insert(std::min(text.find('e'), text.size()), ".0");
  return text;
}

template <class T, class Format>
std::string format_list(const std::vector<T>& values, Format format) {
  std::vector<std::string> parts;
  for (const T& value : values) parts.push_back(format(value));
  return "[" + join(parts, ", ") + "]";
}

// 0.5, 4096, 10^12, 2^26.
std::string number(double value) {
  for (int base : {10, 2}) {
    double power = 1;
    int exponent = 0;
    for (; power < value; ++exponent) power *= base;
    if (power == value && value > 1e5) return fmt::format("{}^{}", base, exponent);
  }
  return fmt::format("{}", value);
}

}  // namespace

bool Range::contains(double value) const {
  return (low_open ? value > low : value >= low) && (high_open ? value < high : value <= high);
}

bool Range::is_bounded() const {
  return low > -std::numeric_limits<double>::infinity() ||
         high < std::numeric_limits<double>::infinity();
}

std::string Range::text() const {
  if (low_open || high_open) {
    if (high == std::numeric_limits<double>::infinity()) return "above " + number(low);
    return fmt::format("in {}{}, {}{}", low_open ? '(' : '[', number(low), number(high),
                       high_open ? ')' : ']');
  }
  if (low == high) return number(low);
  if (high == std::numeric_limits<double>::infinity()) return "at least " + number(low);
  return number(low) + " to " + number(high);
}

Key::Key(const char* path_text, FieldOf field_function, const char* doc_text)
    : path(path_text), field(field_function), doc(doc_text) {
  Recipe recipe = default_recipe();
  type = std::visit(
      [](auto* pointer) {
        return type_of<typename Unwrap<std::remove_pointer_t<decltype(pointer)>>::Inner>();
      },
      field(recipe, 0));
}

Key&& Key::required() && { return is_required = true, std::move(*this); }
Key&& Key::word(const char* text) && { return word_text = text, std::move(*this); }
Key&& Key::range(double low, double high) && { return bounds = {low, high}, std::move(*this); }
Key&& Key::at_least(double low) && { return bounds.low = low, std::move(*this); }
Key&& Key::above(double low) && {
  return bounds.low = low, bounds.low_open = true, std::move(*this);
}
Key&& Key::half_open(double low, double high) && {
  return bounds = {low, high, false, true}, std::move(*this);
}
Key&& Key::choice() && { return is_choice = true, std::move(*this); }
Key&& Key::count(size_t n) && { return exact_count = n, std::move(*this); }
Key&& Key::at_least_one() && { return least_count = 1, std::move(*this); }
Key&& Key::name(bool upper_case) && {
  return is_name = true, allows_upper_case = upper_case, std::move(*this);
}
Key&& Key::unit(const char* text) && { return unit_text = text, std::move(*this); }
Key&& Key::free() && { return is_free = true, std::move(*this); }
Key&& Key::later(const char* what) && { return later_feature = what, std::move(*this); }

bool is_key_name(std::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
  });
}

const Key* find_key(std::string_view pattern) {
  for (const Key& key : keys()) {
    if (key.path == pattern) return &key;
  }
  return nullptr;
}

bool is_section(std::string_view pattern) {
  return std::any_of(keys().begin(), keys().end(), [&](const Key& key) {
    return key.path.size() > pattern.size() && key.path.starts_with(pattern) &&
           key.path[pattern.size()] == '.';
  });
}

std::vector<std::string> children(std::string_view section) {
  const std::string prefix = section.empty() ? "" : std::string(section) + ".";
  std::vector<std::string> names;
  if (section.empty()) names.push_back("include");
  for (const Key& key : keys()) {
    if (!key.path.starts_with(prefix)) continue;
    const std::string rest = key.path.substr(prefix.size());
    const std::string name = rest.substr(0, rest.find_first_of(".["));
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
  }
  return names;
}

bool is_item_key(const Key& key) { return key.path.find("[]") != std::string::npos; }

std::string list_of(const Key& item_key) {
  return item_key.path.substr(0, item_key.path.find("[]"));
}

std::string leaf_of(std::string_view path) {
  const size_t dot = path.rfind('.');
  return std::string(dot == std::string_view::npos ? path : path.substr(dot + 1));
}

std::string pattern_of(std::string_view path) {
  std::string pattern;
  bool inside = false;
  for (char c : path) {
    if (c == ']') inside = false;
    if (!inside) pattern += c;
    if (c == '[') inside = true;
  }
  return pattern;
}

std::string path_of(const Key& key, size_t index) {
  const size_t place = key.path.find("[]");
  if (place == std::string::npos) return key.path;
  return fmt::format("{}[{}]{}", key.path.substr(0, place), index, key.path.substr(place + 2));
}

size_t instances(const Key& key, const Recipe& recipe) {
  if (!is_item_key(key)) return 1;
  const Key* list = find_key(list_of(key));
  CAPSTAN_CHECK(list != nullptr, "{} has no list", key.path);
  return static_cast<size_t>(std::get<int64_t>(get_value(*list, recipe)));
}

Value get_value(const Key& key, const Recipe& recipe, size_t index) {
  return std::visit(
      [](auto* pointer) -> Value {
        using T = std::remove_pointer_t<decltype(pointer)>;
        if constexpr (kIsMapList<T>) {
          return static_cast<int64_t>(pointer->size());
        } else if constexpr (Unwrap<T>::kOptional) {
          if (!pointer->has_value()) return std::monostate{};
          return **pointer;
        } else {
          return *pointer;
        }
      },
      const_field(key, recipe, index));
}

void set_value(const Key& key, Recipe& recipe, size_t index, const Value& value) {
  std::visit(
      [&](auto* pointer) {
        using T = std::remove_pointer_t<decltype(pointer)>;
        if constexpr (kIsMapList<T>) {
          pointer->resize(static_cast<size_t>(std::get<int64_t>(value)));
        } else if constexpr (Unwrap<T>::kOptional) {
          if (std::holds_alternative<std::monostate>(value)) {
            pointer->reset();
          } else {
            *pointer = std::get<typename Unwrap<T>::Inner>(value);
          }
        } else {
          *pointer = std::get<T>(value);
        }
      },
      key.field(recipe, index));
}

Value default_value(const Key& key) {
  if (key.type == Type::kMapList) return int64_t{0};
  return get_value(key, default_recipe(), 0);
}

std::string format_value(const Key& key, const Value& value) {
  struct Formatter {
    const Key& key;
    std::string operator()(std::monostate) const { return key.word_text; }
    std::string operator()(int64_t v) const { return std::to_string(v); }
    std::string operator()(double v) const { return format_number(v); }
    std::string operator()(bool v) const { return v ? "true" : "false"; }
    std::string operator()(const std::string& v) const { return format_text(v); }
    std::string operator()(const std::vector<int64_t>& v) const {
      return format_list(v, [](int64_t item) { return std::to_string(item); });
    }
    std::string operator()(const std::vector<double>& v) const {
      return format_list(v, format_number);
    }
    std::string operator()(const std::vector<std::string>& v) const {
      return format_list(v, format_text);
    }
  };
  return std::visit(Formatter{key}, value);
}

std::string need_text(const Key& key) {
  static const char* const kNames[] = {
      "an integer",         "a number",          "true or false",   "text",
      "a list of integers", "a list of numbers", "a list of texts", "a list of maps"};
  std::string text = kNames[static_cast<size_t>(key.type)];
  if (key.exact_count) text = fmt::format("a list of {} numbers", *key.exact_count);
  if (key.is_choice) {
    text = (key.type == Type::kTextList ? "a list of " : "one of ") +
           join(find_choice_key(key.path)->available, ", ");
  }
  if (key.least_count > 0) text += " with at least one item";
  if (key.is_name) {
    text = fmt::format("1 to 64 characters of {}0-9 . _ -",
                       key.allows_upper_case ? "A-Z a-z " : "a-z ");
  }
  if (key.bounds.low == key.bounds.high) {
    text = key.bounds.text();
  } else if (key.bounds.is_bounded()) {
    text += key.exact_count || key.type == Type::kIntegerList ? ", each " : ", ";
    text += key.bounds.text();
  }
  if (!key.word_text.empty()) text += ", or " + key.word_text;
  return text;
}

}  // namespace capstan::recipe
