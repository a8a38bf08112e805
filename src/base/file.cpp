// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/base/file.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <system_error>
#include <vector>

#include "capstan/base/bytes.h"
#include "capstan/base/descriptor.h"
#include "capstan/base/error.h"
#include "capstan/base/text.h"

namespace capstan {

void throw_file_error(const char* doing, const Path& path, int code) {
  throw EnvError({.module = "file",
                  .what = std::string(doing) + " " + quote(path.native(), 4096),
                  .got = std::generic_category().message(code)});
}

void Descriptor::reset() noexcept {
  if (number_ >= 0) ::close(std::exchange(number_, -1));
}

void Descriptor::close_checked(const Path& path) {
  // After EINTR Linux has closed the descriptor; closing again could hit another thread's file.
  if (::close(release()) != 0 && errno != EINTR) throw_file_error("closing", path, errno);
}

Descriptor open_file(const Path& path, int flags, int mode) {
  for (;;) {
    const int number = ::open(path.c_str(), flags | O_CLOEXEC, mode);
    if (number >= 0) return Descriptor(number);
    if (errno != EINTR) throw_file_error("opening", path, errno);
  }
}

void write_all(int descriptor, std::span<const std::byte> bytes, const Path& path) {
  while (!bytes.empty()) {
    const ssize_t done = ::write(descriptor, bytes.data(), bytes.size());
    if (done < 0) {
      if (errno == EINTR) continue;
      throw_file_error("writing", path, errno);
    }
    if (done == 0) throw_file_error("writing", path, ENOSPC);
    bytes = bytes.subspan(static_cast<size_t>(done));
  }
}

void fsync_checked(int descriptor, const Path& path) {
  if (::fsync(descriptor) != 0) throw_file_error("syncing", path, errno);
}

namespace {

// The folder a path stands in, "." for a bare name.
Path folder_of(const Path& path) {
  const Path parent = path.parent_path();
  return parent.empty() ? Path(".") : parent;
}

void rename_checked(const Path& from, const Path& to) {
  if (::rename(from.c_str(), to.c_str()) != 0) {
    const int code = errno;
    throw_file_error(("renaming " + quote(from.native(), 4096) + " to").c_str(), to, code);
  }
}

[[noreturn]] void throw_too_large(const Path& path, int64_t limit_bytes) {
  throw EnvError({.module = "file",
                  .what = "reading " + quote(path.native(), 4096),
                  .got = "more than " + format_bytes(limit_bytes),
                  .need = "at most that"});
}

}  // namespace

std::string read_file(const Path& path, int64_t limit_bytes) {
  const Descriptor file = open_file(path, O_RDONLY);
  struct stat info = {};
  if (::fstat(file.get(), &info) != 0) throw_file_error("reading", path, errno);
  if (info.st_size > limit_bytes) throw_too_large(path, limit_bytes);
  // The size is a hint only: files of /proc say 0, and a file may grow while it is read.
  std::string content(static_cast<size_t>(info.st_size) + 1, '\0');
  size_t used = 0;
  for (;;) {
    if (used == content.size()) content.resize(content.size() * 2 + 4096);
    const ssize_t done = ::read(file.get(), content.data() + used, content.size() - used);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) throw_file_error("reading", path, errno);
    if (done == 0) break;
    used += static_cast<size_t>(done);
    if (static_cast<int64_t>(used) > limit_bytes) throw_too_large(path, limit_bytes);
  }
  content.resize(used);
  return content;
}

void write_file_atomic(const Path& path, std::string_view content) {
  static std::atomic<uint64_t> counter{0};
  const std::string name = "." + path.filename().native() + "." + std::to_string(::getpid()) + "." +
                           std::to_string(counter.fetch_add(1)) + ".partial";
  const Path temporary = folder_of(path) / name;
  Descriptor file = open_file(temporary, O_WRONLY | O_CREAT | O_EXCL);
  try {
    write_all(file.get(), std::as_bytes(std::span(content)), temporary);
    fsync_checked(file.get(), temporary);
    file.close_checked(temporary);
    rename_checked(temporary, path);
  } catch (...) {
    ::unlink(temporary.c_str());
    throw;
  }
  fsync_directory(folder_of(path));
}

void fsync_directory(const Path& directory) {
  Descriptor folder = open_file(directory, O_RDONLY | O_DIRECTORY);
  // Some network file systems have no fsync for folders; there is nothing more to ask of them.
  if (::fsync(folder.get()) != 0 && errno != EINVAL) {
    throw_file_error("syncing", directory, errno);
  }
}

void create_directories_durable(const Path& directory) {
  std::vector<Path> missing;
  Path at = directory;
  std::error_code ignored;
  while (!at.empty() && !std::filesystem::exists(at, ignored)) {
    if (at.has_filename()) missing.push_back(at);
    at = at.parent_path();
  }
  for (auto folder = missing.rbegin(); folder != missing.rend(); ++folder) {
    if (::mkdir(folder->c_str(), 0755) != 0 && errno != EEXIST) {
      throw_file_error("creating folder", *folder, errno);
    }
    fsync_directory(folder_of(*folder));
  }
  if (!std::filesystem::is_directory(directory, ignored)) {
    throw_file_error("creating folder", directory, ENOTDIR);
  }
}

bool rename_no_replace(const Path& from, const Path& to) {
  if (::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_NOREPLACE) == 0) return true;
  const int code = errno;
  if (code == EEXIST || code == ENOTEMPTY) return false;
  if (code != EINVAL && code != ENOSYS) {
    throw_file_error(("renaming " + quote(from.native(), 4096) + " to").c_str(), to, code);
  }
  struct stat info = {};
  if (::lstat(to.c_str(), &info) == 0) return false;
  rename_checked(from, to);
  return true;
}

int64_t free_disk_bytes(const Path& path) {
  Path at = std::filesystem::absolute(path);
  std::error_code ignored;
  while (!std::filesystem::exists(at, ignored) && at.has_relative_path()) at = at.parent_path();
  struct statvfs info = {};
  if (::statvfs(at.c_str(), &info) != 0) {
    throw_file_error("reading the free space of", at, errno);
  }
  return static_cast<int64_t>(info.f_bavail) * static_cast<int64_t>(info.f_frsize);
}

}  // namespace capstan
