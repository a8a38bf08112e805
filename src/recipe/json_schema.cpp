// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <nlohmann/json.hpp>

#include "capstan/recipe/load.h"
#include "recipe/schema_internal.h"

namespace capstan::recipe {
namespace {

using Json = nlohmann::ordered_json;

Json json_number(double value) {
  if (std::floor(value) == value && std::fabs(value) < 1e15) return static_cast<int64_t>(value);
  return value;
}

Json json_value(const Key& key, const Value& value) {
  struct Converter {
    const Key& key;
    Json operator()(std::monostate) const { return key.word_text; }
    Json operator()(int64_t v) const {
      return key.type == Type::kMapList ? Json::array() : Json(v);
    }
    Json operator()(double v) const { return v; }
    Json operator()(bool v) const { return v; }
    Json operator()(const std::string& v) const { return v; }
    Json operator()(const std::vector<int64_t>& v) const { return v; }
    Json operator()(const std::vector<double>& v) const { return v; }
    Json operator()(const std::vector<std::string>& v) const { return v; }
  };
  return std::visit(Converter{key}, value);
}

void add_range(Json& schema, const Range& range) {
  const double infinity = std::numeric_limits<double>::infinity();
  if (range.low > -infinity)
    schema[range.low_open ? "exclusiveMinimum" : "minimum"] = json_number(range.low);
  if (range.high < infinity)
    schema[range.high_open ? "exclusiveMaximum" : "maximum"] = json_number(range.high);
}

// The schema of one item, without word, default and description.
Json scalar_schema(const Key& key) {
  Json schema = Json::object();
  switch (key.type) {
    case Type::kInteger:
    case Type::kIntegerList:
      schema["type"] = "integer";
      break;
    case Type::kNumber:
    case Type::kNumberList:
      schema["type"] = "number";
      break;
    case Type::kBoolean:
      schema["type"] = "boolean";
      break;
    default:
      schema["type"] = "string";
      break;
  }
  if (schema["type"] == "string") {
    schema["minLength"] = 1;
    if (key.is_name)
      schema["pattern"] = key.allows_upper_case ? "^[A-Za-z0-9._-]{1,64}$" : "^[a-z0-9._-]{1,64}$";
    if (key.is_choice) schema = {{"enum", find_choice_key(key.path)->available}};
  }
  add_range(schema, key.bounds);
  return schema;
}

bool is_scalar_list(const Key& key) {
  return key.type == Type::kIntegerList || key.type == Type::kNumberList ||
         key.type == Type::kTextList;
}

Json object_schema(const std::string& prefix);

Json key_schema(const Key& key) {
  Json schema;
  if (key.type == Type::kMapList) {
    schema = {{"type", "array"}, {"items", object_schema(key.path + "[].")}};
  } else if (is_scalar_list(key)) {
    schema = {{"type", "array"}, {"items", scalar_schema(key)}};
  } else {
    schema = scalar_schema(key);
  }
  if (key.least_count > 0) schema["minItems"] = key.least_count;
  if (key.exact_count) schema["minItems"] = schema["maxItems"] = *key.exact_count;
  if (!key.word_text.empty()) {
    schema = {{"anyOf", Json::array({std::move(schema), Json{{"const", key.word_text}}})}};
  }
  if (!key.later_feature.empty()) schema = {{"const", json_value(key, default_value(key))}};
  schema["description"] = key.doc;
  if (!key.is_required) schema["default"] = json_value(key, default_value(key));
  return schema;
}

// The map whose keys start with `prefix` ("", "optimizer.", "data.train[].").
Json object_schema(const std::string& prefix) {
  Json properties = Json::object(), required = Json::array();
  if (prefix.empty()) {
    properties["include"] = {
        {"type", "array"},
        {"items", {{"type", "string"}, {"minLength", 1}}},
        {"description", "Recipes read first, in order; relative to this file."},
        {"default", Json::array()}};
  }
  const auto require = [&](const std::string& name) {
    for (const Json& known : required) {
      if (known == name) return;
    }
    required.push_back(name);
  };
  for (const Key& key : keys()) {
    if (!key.path.starts_with(prefix)) continue;
    const std::string rest = key.path.substr(prefix.size());
    if (rest.find('[') != std::string::npos) continue;  // an item key; its list brings it
    const size_t dot = rest.find('.');
    const std::string name = rest.substr(0, dot);
    if (key.is_required) require(name);
    if (properties.contains(name)) continue;
    properties[name] =
        dot == std::string::npos ? key_schema(key) : object_schema(prefix + name + ".");
  }
  return {{"type", "object"},
          {"additionalProperties", false},
          {"required", std::move(required)},
          {"properties", std::move(properties)}};
}

}  // namespace

std::string json_schema() {
  Json schema = {
      {"$schema", "https://json-schema.org/draft/2020-12/schema"},
      {"title", "Capstan recipe"},
      {"description", "A recipe without includes. Rules between keys: docs/recipes.md."}};
  schema.update(object_schema(""));
  return schema.dump(2) + "\n";
}

}  // namespace capstan::recipe
