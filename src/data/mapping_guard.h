// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A mapped file that shrinks turns the next touch into SIGBUS. The guard knows our mappings and
// ends the process with the file, the offset and exit code 94; a SIGBUS from elsewhere goes to
// whoever had the signal before.
#pragma once
#include <cstddef>
#include <span>
#include <string>

namespace capstan::data {

// Registers a mapping for its lifetime. Thread-safe. More than 1,024 at once: the rest are not
// guarded.
class MappingGuard {
 public:
  MappingGuard(std::span<const std::byte> bytes, const std::string& path);
  ~MappingGuard();
  MappingGuard(const MappingGuard&) = delete;
  MappingGuard& operator=(const MappingGuard&) = delete;

 private:
  int slot_ = -1;
};

}  // namespace capstan::data
