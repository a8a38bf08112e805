// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>

#include "capstan/base/text.h"
#include "capstan/recipe/load.h"
#include "recipe/schema_internal.h"

namespace capstan::recipe {
namespace {

constexpr size_t kOriginColumn = 52;

std::vector<std::string> split(const std::string& path) {
  std::vector<std::string> parts;
  size_t start = 0;
  for (size_t dot = path.find('.'); dot != std::string::npos; dot = path.find('.', start)) {
    parts.push_back(path.substr(start, dot - start));
    start = dot + 1;
  }
  parts.push_back(path.substr(start));
  return parts;
}

// Writes keys in table order as nested maps; sections open and close as the paths change.
class Dumper {
 public:
  Dumper(const Recipe& recipe, const Resolved* origins) : recipe_(recipe), origins_(origins) {}

  std::string run() {
    for (const Key& key : keys()) {
      if (is_item_key(key)) continue;  // written with its list
      open_sections(key.path);
      const std::string indent(2 * open_.size(), ' ');
      if (key.type == Type::kMapList) {
        write_list(key, indent);
      } else {
        write(indent + leaf_of(key.path) + ":", format_value(key, get_value(key, recipe_)),
              key.path);
      }
      if (key.path == "version") write("include:", "[]", "include");
    }
    return std::move(text_);
  }

 private:
  void open_sections(const std::string& path) {
    std::vector<std::string> sections = split(path);
    sections.pop_back();
    size_t shared = 0;
    while (shared < std::min(sections.size(), open_.size()) && sections[shared] == open_[shared])
      ++shared;
    for (size_t depth = shared; depth < sections.size(); ++depth) {
      text_ += std::string(2 * depth, ' ') + sections[depth] + ":\n";
    }
    open_ = std::move(sections);
  }

  void write_list(const Key& key, const std::string& indent) {
    const auto size = static_cast<size_t>(std::get<int64_t>(get_value(key, recipe_)));
    write(indent + leaf_of(key.path) + ":", size == 0 ? "[]" : "", key.path);
    for (size_t i = 0; i < size; ++i) {
      std::string lead = indent + "  - ";
      for (const Key& item : keys()) {
        if (!is_item_key(item) || list_of(item) != key.path) continue;
        write(lead + leaf_of(item.path) + ":", format_value(item, get_value(item, recipe_, i)),
              path_of(item, i));
        lead = indent + "    ";
      }
    }
  }

  void write(const std::string& lead, const std::string& value, const std::string& path) {
    std::string line = value.empty() ? lead : lead + " " + value;
    if (origins_ != nullptr && path != "include") {
      line.resize(std::max(line.size() + 2, kOriginColumn), ' ');
      line += "# " + shown_origin(path);
    }
    text_ += line + "\n";
  }

  // A file name may hold anything; a comment may not.
  [[nodiscard]] std::string shown_origin(const std::string& path) const {
    const std::string text = origins_->origin_of(path).text();
    const std::string quoted = quote(text, 4096);
    return quoted == "'" + text + "'" ? text : quoted;
  }

  const Recipe& recipe_;
  const Resolved* origins_;
  std::vector<std::string> open_;
  std::string text_;
};

}  // namespace

std::string dump_recipe(const Resolved& resolved, bool with_origins) {
  return Dumper(resolved.recipe, with_origins ? &resolved : nullptr).run();
}

std::string dump_recipe(const Recipe& recipe) { return Dumper(recipe, nullptr).run(); }

}  // namespace capstan::recipe
