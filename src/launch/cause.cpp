// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "capstan/base/error.h"
#include "capstan/base/text.h"
#include "capstan/launch/rank_env.h"
#include "launch/cause_internal.h"
#include "launch/log_file_internal.h"

namespace capstan::launch::internal {

namespace {

constexpr int64_t kTailBytes = 64 << 10;
constexpr size_t kLineBytes = 1000, kMostLines = 20;

std::string read_end(const Path& path) {
  try {
    const auto file = capstan::open_file(path, O_RDONLY);
    const off_t size = ::lseek(file.get(), 0, SEEK_END);
    const off_t start = std::max<off_t>(0, size - kTailBytes);
    std::string text(static_cast<size_t>(size - start), '\0');
    const ssize_t got = ::pread(file.get(), text.data(), text.size(), start);
    text.resize(got > 0 ? static_cast<size_t>(got) : 0);
    return text;
  } catch (const Error&) {
    return "";
  }
}

std::string read_tail(const Path& log) {
  std::string text;
  const std::vector<Path> parts = log_parts(log);
  for (auto part = parts.rbegin(); part != parts.rend(); ++part) {
    if (static_cast<int64_t>(text.size()) >= kTailBytes) break;
    text.insert(0, read_end(*part));
  }
  return text;
}

// A terminal must not act on what a rank printed.
std::string printable(std::string_view line) {
  const std::string quoted = quote(line, kLineBytes);
  const size_t end = quoted.rfind('\'');
  std::string out;
  for (size_t i = 1; i < end; ++i) {
    const bool escaped = quoted[i] == '\\' && (quoted[i + 1] == '\'' || quoted[i + 1] == '\\');
    out += quoted[escaped ? ++i : i];
  }
  return out + quoted.substr(end + 1);
}

std::string reason_of(const RankRecord& record) {
  const Outcome& outcome = record.outcome;
  if (record.killed && record.outcome.signal == SIGKILL) {
    return "did not stop within the grace and was killed";
  }
  if (outcome.signal != 0) {
    return fmt::format("was ended by signal {} ({}){}", outcome.signal, ::strsignal(outcome.signal),
                       outcome.signal == SIGKILL ? ", perhaps for lack of memory" : "");
  }
  if (outcome.exit_code != 0) return fmt::format("exited with code {}", outcome.exit_code);
  return "exited with code 0 before the run had ended";
}

struct Candidate {
  const RankRecord* record;
  std::optional<ErrorFile> error;
  [[nodiscard]] int64_t time_ns() const {
    return error ? std::min(error->time_ns, record->outcome.time_ns) : record->outcome.time_ns;
  }
  // A rank that lost its connection, or left with 0, is asked after one that crashed.
  [[nodiscard]] auto order() const {
    const bool second = record->outcome.is_clean() || (error && error->is_cascade);
    return std::tuple(second, time_ns(), record->rank);
  }
};

bool is_preempted(const RankRecord& record) {
  return record.outcome.signal == 0 && record.outcome.exit_code == exit_codes::kPreempted;
}

// Failed before we told it to stop, or wrote down its error before that.
bool failed_by_itself(const RankRecord& record, const std::optional<ErrorFile>& error) {
  if (record.outcome.is_clean()) return record.left_early && !record.declared_done;
  if (is_preempted(record)) return false;
  if (record.signalled_ns == 0 || record.outcome.time_ns < record.signalled_ns) return true;
  return error && error->time_ns < record.signalled_ns;
}

// After a stop signal from outside: a rank whose own code says that its save failed, or that had to
// be killed.
bool failed_to_stop(const RankRecord& record) {
  if (record.outcome.is_clean() || is_preempted(record)) return false;
  return record.outcome.signal == 0 || record.killed ||
         (record.outcome.signal != record.last_signal);
}

std::optional<Candidate> first_of(std::span<const RankRecord> records, bool by_itself) {
  std::optional<Candidate> best;
  for (const RankRecord& record : records) {
    Candidate candidate = {&record, read_error_file(record.log_directory / "error.json")};
    const bool counts =
        by_itself ? failed_by_itself(record, candidate.error) : failed_to_stop(record);
    if (counts && (!best || candidate.order() < best->order())) best = std::move(candidate);
  }
  return best;
}

}  // namespace

std::vector<std::string> last_lines(const Path& log_directory, size_t most) {
  std::string text = read_tail(log_directory / "stderr.log");
  if (text.find_first_not_of(" \n\r\t") == std::string::npos) {
    text = read_tail(log_directory / "stdout.log");
  }
  std::vector<std::string> lines;
  while (!text.empty() && text.back() == '\n') text.pop_back();
  while (lines.size() < most && !text.empty()) {
    const size_t start = text.rfind('\n') == std::string::npos ? 0 : text.rfind('\n') + 1;
    lines.push_back(printable(std::string_view(text).substr(start)));
    text.resize(start > 0 ? start - 1 : 0);
  }
  std::reverse(lines.begin(), lines.end());
  return lines;
}

std::optional<RankFailure> find_cause(std::span<const RankRecord> records) {
  std::optional<Candidate> cause = first_of(records, true);
  if (!cause) cause = first_of(records, false);
  if (!cause) return std::nullopt;
  const RankRecord& record = *cause->record;
  RankFailure failure = {.rank = record.rank,
                         .exit_code = record.outcome.exit_code,
                         .signal = record.outcome.signal,
                         .reason = reason_of(record),
                         .log_directory = record.log_directory,
                         .last_lines = last_lines(record.log_directory, kMostLines)};
  if (cause->error) {
    failure.class_name = cause->error->class_name;
    failure.message = cause->error->message;
  }
  return failure;
}

}  // namespace capstan::launch::internal
