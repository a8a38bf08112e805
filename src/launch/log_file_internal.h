// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A log that stays below its limit: its beginning and its newest part are kept.
#pragma once
#include <cstdint>
#include <string_view>
#include <vector>

#include "capstan/base/descriptor.h"

namespace capstan::launch::internal {

// The first half of the limit goes to NAME.log for good. What follows goes to NAME.newest.log;
// when that holds a quarter of the limit, it becomes NAME.newest.log.1, replacing an older one, and
// a new one begins. A file ends with the line that fills it, unless that line is longer than 64 KiB
// or than the part. One thread at a time.
class LogFile {
 public:
  LogFile(Path path, int64_t limit_bytes);  // goes on in the files that exist
  // Never throws: what cannot be written is lost, the first time with a warning.
  void write(std::string_view bytes) noexcept;

 private:
  [[nodiscard]] int64_t capacity() const { return in_head_ ? 2 * part_bytes_ : part_bytes_; }
  // How many of the bytes still belong to the open file.
  [[nodiscard]] size_t share_of(std::string_view bytes) const;
  void open(const Path& path);
  void open_next();
  void put(std::string_view bytes);

  Path path_, newest_;
  int64_t part_bytes_, slack_bytes_;
  int64_t size_ = 0;  // of the open file
  bool in_head_ = true, is_line_complete_ = true, has_warned_ = false;
  capstan::Descriptor file_;
};

// The files of a log in the order of their writing, as far as they exist.
[[nodiscard]] std::vector<Path> log_parts(const Path& path);

}  // namespace capstan::launch::internal
