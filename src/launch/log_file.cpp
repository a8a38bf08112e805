// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

#include "capstan/base/log.h"
#include "launch/log_file_internal.h"

namespace capstan::launch::internal {
namespace {

constexpr int64_t kSlackBytes = 64 << 10;

Path newest_of(const Path& path) {
  return path.parent_path() / (path.stem().native() + ".newest" + path.extension().native());
}
Path older_of(const Path& newest) { return newest.native() + ".1"; }

}  // namespace

LogFile::LogFile(Path path, int64_t limit_bytes)
    : path_(std::move(path)),
      newest_(newest_of(path_)),
      part_bytes_(limit_bytes / 4),
      slack_bytes_(std::min(kSlackBytes, part_bytes_)) {
  open(path_);
}

void LogFile::open(const Path& path) {
  file_ = capstan::open_file(path, O_WRONLY | O_CREAT | O_APPEND);
  size_ = std::max<off_t>(0, ::lseek(file_.get(), 0, SEEK_END));
  is_line_complete_ = true;
}

void LogFile::open_next() {
  if (!std::exchange(in_head_, false)) std::filesystem::rename(newest_, older_of(newest_));
  open(newest_);
}

size_t LogFile::share_of(std::string_view bytes) const {
  const int64_t room = capacity() - size_;
  if (room > 0) return std::min(bytes.size(), static_cast<size_t>(room));
  if (is_line_complete_ || -room >= slack_bytes_) return 0;
  const size_t rest = std::min(bytes.size(), static_cast<size_t>(slack_bytes_ + room));
  const size_t end = bytes.substr(0, rest).find('\n');
  return end == std::string_view::npos ? rest : end + 1;
}

void LogFile::put(std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t done = ::write(file_.get(), bytes.data(), bytes.size());
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) capstan::throw_file_error("writing", path_, done < 0 ? errno : EIO);
    size_ += done;
    is_line_complete_ = bytes[static_cast<size_t>(done) - 1] == '\n';
    bytes.remove_prefix(static_cast<size_t>(done));
  }
}

void LogFile::write(std::string_view bytes) noexcept {
  try {
    while (!bytes.empty()) {
      const size_t share = share_of(bytes);
      if (share == 0) open_next();
      put(bytes.substr(0, share));
      bytes.remove_prefix(share);
    }
  } catch (const std::exception& error) {
    // The disk may have room again later; training goes on in any case.
    if (!std::exchange(has_warned_, true))
      log::warning("launch", "output of a rank is not logged: {}", error.what());
  }
}

std::vector<Path> log_parts(const Path& path) {
  std::vector<Path> parts = {path, older_of(newest_of(path)), newest_of(path)};
  std::erase_if(parts, [](const Path& part) {
    std::error_code ignored;
    return !std::filesystem::exists(part, ignored);
  });
  return parts;
}

}  // namespace capstan::launch::internal
