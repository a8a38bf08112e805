// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <vector>

#include "capstan/base/check.h"
#include "capstan/base/descriptor.h"
#include "capstan/base/error.h"
#include "capstan/base/file.h"
#include "capstan/base/text.h"

namespace capstan {

namespace {

constexpr size_t kBufferBytes = size_t{1} << 20;

}  // namespace

struct FileWriter::State {
  explicit State(Path target) : path(std::move(target)) {
    file = open_file(path, O_WRONLY | O_CREAT | O_EXCL);
    buffer.reserve(kBufferBytes);
  }
  ~State() {
    if (closed) return;
    file.reset();
    ::unlink(path.c_str());
  }
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  void put(std::span<const std::byte> bytes) {
    try {
      write_all(file.get(), bytes, path);
    } catch (...) {
      broken = true;
      throw;
    }
  }
  void flush() {
    put(buffer);
    buffer.clear();
  }

  Path path;
  Descriptor file;
  std::vector<std::byte> buffer;
  Hasher hasher;
  int64_t size = 0;
  bool closed = false, broken = false;
};

FileWriter::FileWriter(Path path) : state_(std::make_unique<State>(std::move(path))) {}
FileWriter::~FileWriter() = default;
FileWriter::FileWriter(FileWriter&&) noexcept = default;
FileWriter& FileWriter::operator=(FileWriter&&) noexcept = default;

void FileWriter::write(std::span<const std::byte> bytes) {
  CAPSTAN_CHECK(state_ && !state_->closed, "write to a closed FileWriter");
  CAPSTAN_CHECK(!state_->broken, "write to {} after a failed write", state_->path.native());
  state_->hasher.update(bytes);
  state_->size += static_cast<int64_t>(bytes.size());
  if (state_->buffer.size() + bytes.size() > kBufferBytes) state_->flush();
  if (bytes.size() >= kBufferBytes) {
    state_->put(bytes);
  } else {
    state_->buffer.insert(state_->buffer.end(), bytes.begin(), bytes.end());
  }
}

void FileWriter::write(std::string_view text) { write(std::as_bytes(std::span(text))); }
int64_t FileWriter::size() const { return state_->size; }

std::string FileWriter::close() {
  CAPSTAN_CHECK(state_ && !state_->closed, "FileWriter closed twice");
  CAPSTAN_CHECK(!state_->broken, "close of {} after a failed write", state_->path.native());
  State& state = *state_;
  state.flush();
  state.broken = true;  // until everything below has passed
  fsync_checked(state.file.get(), state.path);
  struct stat info = {};
  if (::fstat(state.file.get(), &info) != 0) {
    throw_file_error("checking", state.path, errno);
  }
  if (info.st_size != state.size) {
    throw EnvError({.module = "file",
                    .what = "writing " + quote(state.path.native(), 4096),
                    .got = std::to_string(info.st_size) + " bytes",
                    .need = std::to_string(state.size)});
  }
  state.file.close_checked(state.path);
  const Path folder = state.path.parent_path();
  fsync_directory(folder.empty() ? Path(".") : folder);
  state.broken = false;
  state.closed = true;
  return state.hasher.hex();
}

}  // namespace capstan
