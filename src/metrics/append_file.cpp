// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "capstan/base/log.h"
#include "capstan/base/text.h"
#include "metrics/append_file_internal.h"

namespace capstan::metrics::internal {

AppendFile::AppendFile(Path path, std::string label)
    : path_(std::move(path)), label_(std::move(label)) {
  std::error_code ignored;
  std::filesystem::create_directories(path_.parent_path(), ignored);
  descriptor_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (descriptor_ < 0) {
    fail("opening", errno);
    return;
  }
  struct stat info = {};
  if (::fstat(descriptor_, &info) == 0) size_ = info.st_size;
}

AppendFile::~AppendFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
  if (dropped_ == 0) return;
  try {
    log::warning("metrics", "{} records of {} were lost", dropped_, quote(path_.native(), 4096));
  } catch (...) {  // the program ends; there is no one left to tell
  }
}

int AppendFile::append_locked(std::string_view record) {
  if (descriptor_ < 0) return EBADF;
  size_t done = 0;
  while (done < record.size()) {
    const ssize_t wrote = ::write(descriptor_, record.data() + done, record.size() - done);
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote <= 0) {
      const int code = wrote < 0 ? errno : ENOSPC;
      // Without this a reader would see half a record joined to the next one. If even that fails,
      // stop here.
      if (done > 0 && ::ftruncate(descriptor_, size_) != 0) {
        ::close(std::exchange(descriptor_, -1));
      }
      return code;
    }
    done += static_cast<size_t>(wrote);
  }
  size_ += static_cast<int64_t>(done);
  return 0;
}

bool AppendFile::append(std::string_view record) {
  int code = 0;
  {
    const std::lock_guard lock(mutex_);
    code = append_locked(record);
    if (code != 0) ++dropped_;
  }
  if (code != 0) fail("writing", code);
  return code == 0;
}

void AppendFile::sync() {
  int code = 0;
  {
    const std::lock_guard lock(mutex_);
    if (descriptor_ < 0) return;
    if (::fsync(descriptor_) != 0 && errno != EINVAL) code = errno;
  }
  if (code != 0) fail("syncing", code);
}

int64_t AppendFile::dropped() const {
  const std::lock_guard lock(mutex_);
  return dropped_;
}

// Logs outside the lock: the log's observer may write a line to this very file.
void AppendFile::fail(const char* doing, int code) {
  {
    const std::lock_guard lock(mutex_);
    if (std::exchange(warned_, true)) return;
  }
  log::warning("metrics", "{} {} failed: {}; training goes on, lost {} records are counted", doing,
               quote(path_.native(), 4096), std::generic_category().message(code), label_);
}

}  // namespace capstan::metrics::internal
