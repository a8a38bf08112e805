// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include "capstan/base/text.h"
#include "recipe/binder_internal.h"
#include "recipe/scalar_internal.h"

namespace capstan::recipe {
namespace {

constexpr size_t kLongestText = 4096;

using ItemResult = std::variant<Value, ValueFault>;

ValueFault fault_of(const Node& node, std::string why) {
  return {node.origin, shown_node(node), std::move(why), node.kind == Node::Kind::kBroken};
}

template <class T>
ItemResult from_scalar(const Node& node, const std::variant<T, Refusal>& parsed) {
  if (const auto* refusal = std::get_if<Refusal>(&parsed)) return fault_of(node, refusal->why);
  return Value(std::get<T>(parsed));
}

ItemResult read_text_item(const Key& key, const Node& node) {
  if (node.text.empty()) return fault_of(node, "it is empty");
  if (node.text.size() > kLongestText) return fault_of(node, "it is too long");
  for (char c : node.text) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      return fault_of(node, "it holds a line break or control character");
    }
  }
  if (node.plain && !key.is_choice && is_ambiguous_text(node.text)) {
    return fault_of(node, "some readers take it for something other than text; put it in quotes");
  }
  return Value(node.text);
}

ItemResult read_item(const Key& key, const Node& node) {
  if (node.kind != Node::Kind::kScalar) return fault_of(node, "");
  const bool is_text = key.type == Type::kText || key.type == Type::kTextList;
  if (is_text) return read_text_item(key, node);
  if (!node.plain) return fault_of(node, "quotes make it text");
  switch (key.type) {
    case Type::kInteger:
    case Type::kIntegerList:
      return from_scalar<int64_t>(node, parse_integer(node.text));
    case Type::kBoolean:
      return from_scalar<bool>(node, parse_boolean(node.text));
    default:
      return from_scalar<double>(node, parse_number(node.text));
  }
}

template <class T>
ItemResult read_list(const Key& key, const Node& node) {
  if (node.kind != Node::Kind::kList) return fault_of(node, "");
  std::vector<T> values;
  for (const Node& child : node.items) {
    ItemResult item = read_item(key, child);
    if (auto* fault = std::get_if<ValueFault>(&item)) return std::move(*fault);
    values.push_back(std::get<T>(std::get<Value>(item)));
  }
  return Value(std::move(values));
}

}  // namespace

std::string shown_node(const Node& node) {
  switch (node.kind) {
    case Node::Kind::kMap:
      return "a map";
    case Node::Kind::kList:
      return node.items.empty() ? "an empty list" : fmt::format("a list of {}", node.items.size());
    case Node::Kind::kBroken:
      return "nothing";
    case Node::Kind::kScalar:
      break;
  }
  return node.plain && is_ambiguous_text(node.text) ? node.text.substr(0, 80) : quote(node.text);
}

std::variant<Value, ValueFault> read_value(const Key& key, const Node& node) {
  const bool is_word = node.kind == Node::Kind::kScalar && node.text == key.word_text;
  if (is_word && !key.word_text.empty()) return Value(std::monostate{});
  switch (key.type) {
    case Type::kIntegerList:
      return read_list<int64_t>(key, node);
    case Type::kNumberList:
      return read_list<double>(key, node);
    case Type::kTextList:
      return read_list<std::string>(key, node);
    default:
      return read_item(key, node);
  }
}

}  // namespace capstan::recipe
