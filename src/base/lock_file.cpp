// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "capstan/base/descriptor.h"
#include "capstan/base/file.h"

namespace capstan {

namespace {

// True if `path` still names the open file: its holder may have removed it between open and flock.
bool is_same_file(int descriptor, const Path& path) {
  struct stat open_info = {}, path_info = {};
  return ::fstat(descriptor, &open_info) == 0 && ::stat(path.c_str(), &path_info) == 0 &&
         open_info.st_dev == path_info.st_dev && open_info.st_ino == path_info.st_ino;
}

std::string read_content(int descriptor) {
  std::string content(4096, '\0');
  const ssize_t size = ::pread(descriptor, content.data(), content.size(), 0);
  content.resize(size > 0 ? static_cast<size_t>(size) : 0);
  return content;
}

// False when another process holds the lock.
bool try_flock(int descriptor, const Path& path) {
  while (::flock(descriptor, LOCK_EX | LOCK_NB) != 0) {
    if (errno == EWOULDBLOCK) return false;
    if (errno != EINTR) throw_file_error("locking", path, errno);
  }
  return true;
}

}  // namespace

std::unique_ptr<LockFile> LockFile::try_acquire(const Path& path, std::string_view content,
                                                std::string* holder) {
  for (;;) {
    Descriptor file = open_file(path, O_RDWR | O_CREAT);
    if (!try_flock(file.get(), path)) {
      if (holder != nullptr) *holder = read_content(file.get());
      return nullptr;
    }
    if (!is_same_file(file.get(), path)) continue;
    if (::ftruncate(file.get(), 0) != 0) throw_file_error("writing", path, errno);
    write_all(file.get(), std::as_bytes(std::span(content)), path);
    return std::unique_ptr<LockFile>(new LockFile(file.release()));
  }
}

LockFile::~LockFile() { ::close(descriptor_); }

}  // namespace capstan
