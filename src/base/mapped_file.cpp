// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>
#include <utility>

#include "capstan/base/descriptor.h"
#include "capstan/base/error.h"
#include "capstan/base/file.h"
#include "capstan/base/text.h"

namespace capstan {

MappedFile::MappedFile(const Path& path) : path_(path) {
  // O_NONBLOCK: a named pipe in the place of a file must not block for ever.
  const Descriptor file = open_file(path, O_RDONLY | O_NONBLOCK);
  struct stat info = {};
  if (::fstat(file.get(), &info) != 0) throw_file_error("mapping", path, errno);
  if (!S_ISREG(info.st_mode)) {
    throw EnvError({.module = "file",
                    .what = "mapping " + quote(path.native(), 4096),
                    .got = S_ISDIR(info.st_mode) ? "a folder" : "a special file",
                    .need = "a regular file"});
  }
  size_ = static_cast<size_t>(info.st_size);
  if (size_ == 0) return;
  void* address = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.get(), 0);
  if (address == MAP_FAILED) throw_file_error("mapping", path, errno);
  data_ = static_cast<const std::byte*>(address);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

}  // namespace capstan
