// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Files that survive a crash, and mapped files. All functions throw EnvError naming path and errno
// text. fsync failures are final for the attempt: a write that failed is never retried on the same
// descriptor.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "capstan/base/hash.h"

namespace capstan {

using Path = std::filesystem::path;

[[nodiscard]] std::string read_file(const Path& path, int64_t limit_bytes = int64_t{1} << 32);

// Appends bytes to a new file and hashes them on the way; close() fsyncs and checks the size. A
// file that was not closed is removed by the destructor.
class FileWriter {
 public:
  explicit FileWriter(Path path);  // must not exist
  ~FileWriter();
  FileWriter(FileWriter&&) noexcept;
  FileWriter& operator=(FileWriter&&) noexcept;
  void write(std::span<const std::byte> bytes);
  void write(std::string_view text);
  [[nodiscard]] int64_t size() const;
  std::string close();  // durable; returns the XXH3-128 of the content

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Readers see the old content or the new one, never a part: temporary file, fsync, rename, fsync of
// the folder.
void write_file_atomic(const Path& path, std::string_view content);

void fsync_directory(const Path& directory);
void create_directories_durable(const Path& directory);
// Rename that refuses an existing target (renameat2 RENAME_NOREPLACE; a checked plain rename where
// the file system lacks it). Returns false when the target exists.
[[nodiscard]] bool rename_no_replace(const Path& from, const Path& to);
[[nodiscard]] int64_t free_disk_bytes(const Path& path);  // of the nearest existing parent

// A read-only mapping of a whole file.
class MappedFile {
 public:
  explicit MappedFile(const Path& path);
  ~MappedFile();
  MappedFile(MappedFile&&) noexcept;
  MappedFile& operator=(MappedFile&&) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  [[nodiscard]] std::span<const std::byte> bytes() const { return {data_, size_}; }
  [[nodiscard]] const Path& path() const { return path_; }

 private:
  Path path_;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// An exclusive advisory lock (flock) held for the life of the object; close-on-exec.
class LockFile {
 public:
  // nullptr when another process holds it; `content` then describes the holder (what it wrote).
  [[nodiscard]] static std::unique_ptr<LockFile> try_acquire(const Path& path,
                                                             std::string_view content,
                                                             std::string* holder);
  ~LockFile();
  LockFile(const LockFile&) = delete;
  LockFile& operator=(const LockFile&) = delete;

 private:
  explicit LockFile(int descriptor) : descriptor_(descriptor) {}
  int descriptor_;
};

}  // namespace capstan
