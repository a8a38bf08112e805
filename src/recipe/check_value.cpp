// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "recipe/check_value_internal.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "capstan/base/text.h"

namespace capstan::recipe {
namespace {

std::vector<double> numbers_in(const Value& value) {
  if (const auto* integer = std::get_if<int64_t>(&value)) return {static_cast<double>(*integer)};
  if (const auto* number = std::get_if<double>(&value)) return {*number};
  if (const auto* list = std::get_if<std::vector<double>>(&value)) return *list;
  if (const auto* list = std::get_if<std::vector<int64_t>>(&value)) {
    return {list->begin(), list->end()};
  }
  return {};
}

std::vector<std::string> texts_in(const Value& value) {
  if (const auto* text = std::get_if<std::string>(&value)) return {*text};
  if (const auto* list = std::get_if<std::vector<std::string>>(&value)) return *list;
  return {};
}

std::optional<size_t> length_of(const Value& value) {
  if (const auto* list = std::get_if<std::vector<double>>(&value)) return list->size();
  if (const auto* list = std::get_if<std::vector<int64_t>>(&value)) return list->size();
  if (const auto* list = std::get_if<std::vector<std::string>>(&value)) return list->size();
  return std::nullopt;
}

bool contains(const std::vector<std::string>& list, const std::string& text) {
  return std::find(list.begin(), list.end(), text) != list.end();
}

std::optional<Complaint> check_choice(const Key& key, const std::string& text) {
  const ChoiceKey& choice = *find_choice_key(key.path);
  if (contains(choice.available, text)) return std::nullopt;
  const std::string has = join(choice.available, ", ");
  if (contains(choice.known, text)) {
    return Complaint{quote(text) + " is not in this build", "", "has: " + has, ""};
  }
  Complaint complaint{quote(text), "one of " + has, "", ""};
  if (const auto near = nearest_name(text, choice.available)) {
    complaint.fix = fmt::format("Perhaps '{}' was meant", *near);
  }
  return complaint;
}

bool is_name(const Key& key, const std::string& text) {
  const auto fits = [&](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') ||
           (c != '\0' && std::strchr("._-", c)) || (key.allows_upper_case && c >= 'A' && c <= 'Z');
  };
  return !text.empty() && text.size() <= 64 && std::all_of(text.begin(), text.end(), fits);
}

std::optional<Complaint> check_texts(const Key& key, const Value& value) {
  std::vector<std::string> seen;
  for (const std::string& text : texts_in(value)) {
    if (key.is_choice) {
      if (auto complaint = check_choice(key, text)) return complaint;
    }
    if (key.is_name && !is_name(key, text)) return Complaint{quote(text), need_text(key), "", ""};
    if (key.is_name && (text == "." || text == "..")) {
      return Complaint{quote(text), "a name", "it names a folder that exists", ""};
    }
    if (contains(seen, text)) return Complaint{quote(text) + " twice", "each once", "", ""};
    seen.push_back(text);
  }
  return std::nullopt;
}

}  // namespace

std::optional<Complaint> check_value(const Key& key, const Value& value) {
  if (const auto length = length_of(value)) {
    const bool fits = key.exact_count ? *length == *key.exact_count : *length >= key.least_count;
    if (!fits) return Complaint{fmt::format("a list of {}", *length), need_text(key), "", ""};
  }
  for (double number : numbers_in(value)) {
    if (!key.bounds.contains(number))
      return Complaint{format_value(key, value), need_text(key), "", ""};
  }
  if (auto complaint = check_texts(key, value)) return complaint;
  if (!key.later_feature.empty() && value != default_value(key)) {
    const std::string neutral = format_value(key, default_value(key));
    return Complaint{format_value(key, value), neutral, key.later_feature + " is not in this build",
                     fmt::format("Leave the key out or set it to {}", neutral)};
  }
  return std::nullopt;
}

}  // namespace capstan::recipe
