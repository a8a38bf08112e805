// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A file that grows record by record and may fail without harm: the first failure is logged, later
// ones counted.
#pragma once
#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>

#include "capstan/base/file.h"

namespace capstan::metrics::internal {

// Thread-safe. A record that was written in part is taken back, so that the next one starts clean.
class AppendFile {
 public:
  // `label` names the file in the warning ("metrics"); a file that cannot be opened drops every
  // record.
  AppendFile(Path path, std::string label);
  ~AppendFile();
  AppendFile(const AppendFile&) = delete;
  AppendFile& operator=(const AppendFile&) = delete;

  bool append(std::string_view record);
  void sync();
  [[nodiscard]] int64_t dropped() const;
  [[nodiscard]] const Path& path() const { return path_; }

 private:
  int append_locked(std::string_view record);  // errno value, 0 = written
  void fail(const char* doing, int code);

  Path path_;
  std::string label_;
  mutable std::mutex mutex_;
  int descriptor_ = -1;
  int64_t size_ = 0, dropped_ = 0;
  bool warned_ = false;
};

}  // namespace capstan::metrics::internal
