// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// One descriptor with checked system calls; errors name the path and the text of errno.
#pragma once
#include <cstddef>
#include <span>
#include <string>
#include <utility>

#include "capstan/base/file.h"

namespace capstan {

// `code` is an errno value; `doing` reads "writing", "opening".
[[noreturn]] void throw_file_error(const char* doing, const Path& path, int code);

class Descriptor {
 public:
  explicit Descriptor(int number = -1) : number_(number) {}
  ~Descriptor() { reset(); }
  Descriptor(Descriptor&& other) noexcept : number_(std::exchange(other.number_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    if (this != &other) {
      reset();
      number_ = std::exchange(other.number_, -1);
    }
    return *this;
  }
  [[nodiscard]] int get() const { return number_; }
  [[nodiscard]] int release() { return std::exchange(number_, -1); }
  void reset() noexcept;
  void close_checked(
      const Path& path);  // close() reports late write errors on network file systems

 private:
  int number_;
};

// open() with O_CLOEXEC, repeated after EINTR.
[[nodiscard]] Descriptor open_file(const Path& path, int flags, int mode = 0644);
void write_all(int descriptor, std::span<const std::byte> bytes, const Path& path);
void fsync_checked(int descriptor, const Path& path);

}  // namespace capstan
