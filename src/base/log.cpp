// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/base/log.h"

#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <array>
#include <atomic>
#include <memory>
#include <mutex>

#include "capstan/base/error.h"
#include "capstan/base/text.h"

namespace capstan::log {

namespace {

constexpr std::array<std::string_view, 5> kNames = {"debug", "info", "warning", "error", "off"};

std::atomic<Level> level_now{Level::kInfo};
std::atomic<int> process_rank{-1};
thread_local int rank_of_thread = -1;

struct Observer {
  std::mutex mutex;
  void (*function)(void*, Level, std::string_view, std::string_view) = nullptr;
  void* context = nullptr;
};

// Never destroyed: threads may log while the process ends.
Observer& observer() {
  static Observer& instance = *new Observer;
  return instance;
}

spdlog::logger& logger() {
  static spdlog::logger& instance = *[] {
    auto* made = new spdlog::logger("capstan", std::make_shared<spdlog::sinks::stderr_sink_mt>());
    made->set_pattern("[%H:%M:%S.%e] %v");
    made->set_level(spdlog::level::trace);
    made->flush_on(spdlog::level::trace);
    return made;
  }();
  return instance;
}

spdlog::level::level_enum spdlog_level(Level level) {
  switch (level) {
    case Level::kDebug:
      return spdlog::level::debug;
    case Level::kInfo:
      return spdlog::level::info;
    case Level::kWarning:
      return spdlog::level::warn;
    case Level::kError:
      return spdlog::level::err;
    case Level::kOff:
      break;
  }
  return spdlog::level::off;
}

void notify(Level level, std::string_view module, std::string_view text) {
  thread_local bool inside = false;  // an observer that logs must not call itself
  if (inside) return;
  Observer& target = observer();
  const std::lock_guard lock(target.mutex);
  if (target.function == nullptr) return;
  inside = true;
  try {
    target.function(target.context, level, module, text);
  } catch (...) {
    inside = false;
    throw;
  }
  inside = false;
}

}  // namespace

Level parse_level(std::string_view name) {
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (kNames[i] == name) return static_cast<Level>(i);
  }
  throw ConfigError({.module = "log",
                     .what = "reading the log level",
                     .got = quote(name),
                     .need = "debug, info, warning, error or off"});
}

void set_level(Level level) { level_now.store(level, std::memory_order_relaxed); }

bool is_enabled(Level level) {
  const Level now = level_now.load(std::memory_order_relaxed);
  return now != Level::kOff && level >= now;
}

void set_thread_rank(int rank) { rank_of_thread = rank; }
void set_process_rank(int rank) { process_rank.store(rank, std::memory_order_relaxed); }

int thread_rank() {
  return rank_of_thread >= 0 ? rank_of_thread : process_rank.load(std::memory_order_relaxed);
}

void set_observer(void (*function)(void*, Level, std::string_view, std::string_view),
                  void* context) {
  Observer& target = observer();
  const std::lock_guard lock(target.mutex);
  target.function = function;
  target.context = context;
}

void write(Level level, std::string_view module, std::string_view text) {
  if (is_enabled(level)) {
    std::string line;
    if (const int rank = thread_rank(); rank >= 0) line += fmt::format("[rank {}] ", rank);
    if (!module.empty()) line += fmt::format("[{}] ", module);
    if (level == Level::kWarning) line += "warning: ";
    if (level == Level::kError) line += "error: ";
    line += text;
    logger().log(spdlog_level(level), spdlog::string_view_t(line.data(), line.size()));
  }
  if (level >= Level::kWarning) notify(level, module, text);
}

}  // namespace capstan::log
