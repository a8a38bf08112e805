// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/metrics/metrics_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>
#include <system_error>

#include "capstan/base/error.h"
#include "capstan/base/json.h"
#include "capstan/base/log.h"
#include "capstan/base/text.h"
#include "metrics/append_file_internal.h"

namespace capstan::metrics {

namespace {

// Length of the file up to and with its last line break; nullopt on a read error.
std::optional<int64_t> whole_lines_bytes(int descriptor, int64_t size) {
  std::string block(64 << 10, '\0');
  int64_t end = size;
  while (end > 0) {
    const int64_t start = std::max<int64_t>(0, end - static_cast<int64_t>(block.size()));
    const auto wanted = static_cast<size_t>(end - start);
    const ssize_t got = ::pread(descriptor, block.data(), wanted, start);
    if (got != static_cast<ssize_t>(wanted)) return std::nullopt;
    const size_t found = std::string_view(block.data(), wanted).rfind('\n');
    if (found != std::string_view::npos) return start + static_cast<int64_t>(found) + 1;
    end = start;
  }
  return 0;
}

// A line is written with its line break in one call, so a last line without one was torn by a
// crash.
void cut_torn_line(const Path& path) {
  const int descriptor = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (descriptor < 0) return;
  struct stat info = {};
  if (::fstat(descriptor, &info) == 0 && S_ISREG(info.st_mode)) {
    const std::optional<int64_t> keep = whole_lines_bytes(descriptor, info.st_size);
    if (keep && *keep < info.st_size && ::ftruncate(descriptor, *keep) == 0) {
      log::info("metrics", "cut a torn last line of {} bytes from {}", info.st_size - *keep,
                quote(path.native(), 4096));
    }
  }
  ::close(descriptor);
}

std::optional<int64_t> attempt_in(const std::string& line) {
  const json::Json value = json::Json::parse(line, nullptr, false);
  if (!value.is_object()) return std::nullopt;
  const auto found = value.find("attempt");
  if (found == value.end() || !found->is_number_integer()) return std::nullopt;
  const auto attempt = found->get<int64_t>();
  if (attempt < 0 || attempt > 1000000000) return std::nullopt;
  return attempt;
}

}  // namespace

int next_attempt(const Path& path) {
  std::ifstream file(path);
  std::string line, last;
  int64_t highest = -1;
  // Every attempt opens with a start line; its last line stands in for a start line that was lost.
  while (std::getline(file, line)) {
    if (file.eof()) break;  // no line break: torn
    if (line.find("\"kind\":\"start\"") != std::string::npos) {
      highest = std::max(highest, attempt_in(line).value_or(-1));
    }
    if (line.find("\"attempt\":") != std::string::npos) std::swap(last, line);
  }
  return static_cast<int>(std::max(highest, attempt_in(last).value_or(-1)) + 1);
}

struct MetricsFile::State {
  explicit State(const Path& path) : attempt(next_attempt(path)), file(path, "metrics") {}
  template <class Record>
  void put(Record& record) {
    record.attempt = attempt;
    file.append(to_json(record) + "\n");
  }
  int attempt;
  internal::AppendFile file;
};

MetricsFile::MetricsFile(const Path& path) {
  cut_torn_line(path);
  state_ = std::make_unique<State>(path);
}
MetricsFile::~MetricsFile() = default;
int MetricsFile::attempt() const { return state_->attempt; }
void MetricsFile::write(StartRecord record) { state_->put(record); }
void MetricsFile::write(StepRecord record) { state_->put(record); }
void MetricsFile::write(EvalRecord record) { state_->put(record); }
void MetricsFile::write(CheckpointRecord record) { state_->put(record); }
void MetricsFile::write(EventRecord record) { state_->put(record); }
void MetricsFile::write(EndRecord record) { state_->put(record); }
void MetricsFile::sync() { state_->file.sync(); }
int64_t MetricsFile::dropped() const { return state_->file.dropped(); }

}  // namespace capstan::metrics
