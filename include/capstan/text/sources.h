// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Which files make a corpus: files and folders, patterns, size limit, exact duplicates.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "capstan/base/file.h"

namespace capstan::text {

struct SourceOptions {
  std::vector<Path> inputs;  // files and folders; folders are walked, hidden entries left out
  // Patterns of base/text.h on the path relative to the folder given as input (for a file its
  // name). A pattern also takes everything below a folder that it matches. No include = everything.
  std::vector<std::string> include, exclude;
  int64_t max_file_bytes = 0;  // larger files of a folder are left out; 0 = no limit
  bool deduplicate = false;    // of files with equal content only the first is kept
};

struct Source {
  Path path;             // absolute
  std::string relative;  // '/'-separated, relative to the input folder
  int64_t size = 0;      // bytes on disk
};

// What list_sources left out. Binary: a NUL byte in the first 64 KiB (after decompression); not
// UTF-8: an ill-formed sequence there.
struct SourceCounts {
  int64_t not_selected = 0, too_large = 0, binary = 0, not_utf8 = 0, empty = 0, duplicates = 0;
  int64_t broken_links = 0, kept_bytes = 0;
  [[nodiscard]] std::string summary()
      const;  // "left out: 3 binary, 12 duplicates"; empty when none
};

// Sorted by relative path, then by input. Every folder is entered once, so loops of symbolic links
// end. Throws ConfigError for a missing path, an input that yields nothing and an empty selection;
// DataError for a file named by the user that is binary or empty.
[[nodiscard]] std::vector<Source> list_sources(const SourceOptions& options,
                                               SourceCounts* counts = nullptr);

// XXH3-128 over the relative paths, sizes and contents: equal exactly when the corpus is equal.
[[nodiscard]] std::string content_digest(const std::vector<Source>& sources);

// "512KiB", "1.5 MiB", "2GB", "4096": bytes. Throws ConfigError naming `flag`.
[[nodiscard]] int64_t parse_byte_size(std::string_view text, std::string_view flag);

}  // namespace capstan::text
