// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Files and their includes as one merged tree.
#pragma once
#include <filesystem>
#include <string>
#include <vector>

#include "recipe/yaml_tree_internal.h"

namespace capstan::recipe {

inline constexpr size_t kMaxIncludeDepth = 8;
inline constexpr size_t kMaxFiles = 64;

class FileReader {
 public:
  explicit FileReader(Reading& reading) : reading_(reading) {}

  // The tree of a file with its includes below it. Problems with the file itself are thrown.
  [[nodiscard]] Node read(const std::filesystem::path& path);
  [[nodiscard]] Node read_text(const std::string& text, const std::filesystem::path& path);
  [[nodiscard]] const std::vector<std::filesystem::path>& files() const { return files_; }

 private:
  void take_includes(Node& own, Node& merged, const std::filesystem::path& path);
  void include(const Node& item, size_t index, const std::filesystem::path& path, Node& merged);
  void check_version(const Node& root, const std::string& file);

  Reading& reading_;
  std::vector<std::filesystem::path> files_;
  std::vector<std::filesystem::path> open_;  // canonical; from the first file to the current one
};

}  // namespace capstan::recipe
