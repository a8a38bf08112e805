// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "recipe/reader_internal.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <system_error>

#include "capstan/base/bytes.h"
#include "capstan/base/text.h"
#include "recipe/overrides_internal.h"

namespace capstan::recipe {
namespace {

namespace fs = std::filesystem;

// Why a file cannot be read, or its text.
struct FileText {
  std::string text, fault;
};

FileText read_bounded(const fs::path& path) {
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (error) return {"", error.message()};
  if (!fs::is_regular_file(status)) return {"", "it is not a regular file"};
  const auto size = fs::file_size(path, error);
  if (error) return {"", error.message()};
  if (size > static_cast<uintmax_t>(kMaxFileBytes)) {
    return {"", "it has more than " + format_bytes(kMaxFileBytes)};
  }
  errno = 0;
  std::ifstream stream(path, std::ios::binary);
  std::string text(size, '\0');
  if (!stream || (size > 0 && !stream.read(text.data(), static_cast<std::streamsize>(size)))) {
    return {"", errno != 0 ? std::error_code(errno, std::generic_category()).message()
                           : "it changed while it was read"};
  }
  return {std::move(text), ""};
}

fs::path canonical_of(const fs::path& path) {
  std::error_code error;
  fs::path result = fs::weakly_canonical(path, error);
  return error ? path.lexically_normal() : result;
}

Node empty_root(const std::string& file) {
  Node node;
  node.kind = Node::Kind::kMap;
  node.origin = {file, 1, 1};
  return node;
}

}  // namespace

Node FileReader::read(const fs::path& path) {
  FileText file = read_bounded(path);
  if (!file.fault.empty()) {
    throw RecipeError(
        {{{path.string(), 1, 1}, "", "a file that cannot be read", "", file.fault, ""}});
  }
  return read_text(file.text, path);
}

Node FileReader::read_text(const std::string& text, const fs::path& path) {
  const std::string name = path.string();
  Node own = parse_yaml(text, {{name, 1, 1}, false}, reading_);
  if (own.kind != Node::Kind::kMap) {
    if (own.kind != Node::Kind::kBroken) {
      reading_.problems.push_back({own.origin, "",
                                   own.kind == Node::Kind::kList ? "a list" : "one value",
                                   "a map of sections", "a recipe starts like 'version: 1'", ""});
    }
    own = Node{};
    own.kind = Node::Kind::kBroken;
    return own;
  }
  check_version(own, name);
  Node merged = empty_root(name);
  open_.push_back(canonical_of(path));
  take_includes(own, merged, path);
  open_.pop_back();
  files_.push_back(path);
  merge_into(merged, std::move(own));
  merged.origin = {name, 1, 1};
  return merged;
}

void FileReader::check_version(const Node& root, const std::string& file) {
  if (root.find_entry("version") != nullptr) return;
  reading_.problems.push_back({{file, 1, 1},
                               "version",
                               "",
                               "version: 1",
                               "every file names its format",
                               "Add it as first line"});
}

void FileReader::take_includes(Node& own, Node& merged, const fs::path& path) {
  const auto found = std::find_if(own.entries.begin(), own.entries.end(),
                                  [](const Entry& entry) { return entry.key == "include"; });
  if (found == own.entries.end()) return;
  const Entry entry = std::move(*found);
  own.entries.erase(found);
  if (entry.value.kind != Node::Kind::kList) reading_.lacks_a_file = true;
  if (entry.value.kind == Node::Kind::kBroken) return;
  if (entry.value.kind != Node::Kind::kList) {
    reading_.problems.push_back(
        {entry.value.origin, "include",
         entry.value.kind == Node::Kind::kMap ? "a map" : quote(entry.value.text),
         "a list of files", "", "Write it as [file.yaml]"});
    return;
  }
  for (size_t i = 0; i < entry.value.items.size(); ++i)
    include(entry.value.items[i], i, path, merged);
}

void FileReader::include(const Node& item, size_t index, const fs::path& path, Node& merged) {
  if (item.kind == Node::Kind::kBroken) {
    reading_.lacks_a_file = true;
    return;
  }
  const auto report = [&](std::string got, std::string need, std::string why) {
    reading_.lacks_a_file = true;
    reading_.problems.push_back({item.origin, fmt::format("include[{}]", index), std::move(got),
                                 std::move(need), std::move(why), ""});
  };
  if (item.kind != Node::Kind::kScalar || item.text.empty()) {
    return report(item.kind == Node::Kind::kScalar ? "no name" : "a map or list",
                  "the name of a file", "");
  }
  const fs::path target = (path.parent_path() / item.text).lexically_normal();
  const fs::path canonical = canonical_of(target);
  const auto cycle = std::find(open_.begin(), open_.end(), canonical);
  if (cycle != open_.end()) {
    return report(quote(item.text), "a file that does not include this one",
                  "the includes form a cycle");
  }
  if (open_.size() > kMaxIncludeDepth) {
    return report(quote(item.text), fmt::format("at most {} levels of includes", kMaxIncludeDepth),
                  "");
  }
  if (files_.size() + open_.size() > kMaxFiles) {
    return report(quote(item.text), fmt::format("at most {} files", kMaxFiles), "");
  }
  FileText file = read_bounded(target);
  if (!file.fault.empty()) return report(quote(target.string(), 400), "a recipe file", file.fault);
  Node tree = read_text(file.text, target);
  if (tree.kind != Node::Kind::kMap) reading_.lacks_a_file = true;
  if (tree.kind == Node::Kind::kMap) merge_into(merged, std::move(tree));
}

}  // namespace capstan::recipe
