// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/base/env.h"

#include <fmt/format.h>
#include <sys/sysinfo.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>

#include "base/machine_internal.h"
#include "capstan/base/error.h"
#include "capstan/base/file.h"
#include "capstan/base/text.h"

namespace capstan {

std::optional<std::string> read_env(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr) return std::nullopt;
  return std::string(value);
}

std::optional<int64_t> read_env_int(const char* name, int64_t low, int64_t high) {
  const std::optional<std::string> text = read_env(name);
  if (!text) return std::nullopt;
  int64_t value = 0;
  const char* last = text->data() + text->size();
  const auto [end, error] = std::from_chars(text->data(), last, value);
  if (error != std::errc() || end != last || value < low || value > high) {
    throw EnvError({.module = "env",
                    .what = std::string("reading the environment variable ") + name,
                    .got = quote(*text),
                    .need = fmt::format("an integer from {} to {}", low, high),
                    .fix = std::string("Set it right or unset ") + name});
  }
  return value;
}

std::string host_name() {
  char name[256] = {};
  if (::gethostname(name, sizeof(name) - 1) != 0 || name[0] == '\0') return "localhost";
  return name;
}

std::string utc_now() {
  timespec now = {};
  ::clock_gettime(CLOCK_REALTIME, &now);
  tm parts = {};
  ::gmtime_r(&now.tv_sec, &parts);
  return fmt::format("{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:03}Z", parts.tm_year + 1900,
                     parts.tm_mon + 1, parts.tm_mday, parts.tm_hour, parts.tm_min, parts.tm_sec,
                     now.tv_nsec / 1000000);
}

int64_t monotonic_ns() {
  timespec now = {};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<int64_t>(now.tv_sec) * 1000000000 + now.tv_nsec;
}

int allowed_cpus() { return std::max(1, static_cast<int>(internal::affinity_cpus().size())); }

int allowed_physical_cores() {
  const internal::SystemRoots roots;
  int cores = internal::count_physical_cores(internal::affinity_cpus(), roots);
  if (const auto quota = internal::cgroup_cpu_quota(roots)) {
    cores = std::min(cores, std::max(1, static_cast<int>(std::ceil(*quota))));
  }
  return cores;
}

int64_t memory_limit_bytes() {
  struct sysinfo info = {};
  ::sysinfo(&info);
  const int64_t physical = static_cast<int64_t>(info.totalram) * info.mem_unit;
  return std::min(physical, internal::cgroup_memory_limit({}).value_or(physical));
}

int64_t resident_bytes() {
  const std::string text = read_file("/proc/self/statm");  // "size resident shared ..." in pages
  const size_t start = text.find(' ') + 1;
  int64_t pages = 0;
  std::from_chars(text.data() + start, text.data() + text.size(), pages);
  return pages * ::sysconf(_SC_PAGESIZE);
}

std::string cpu_model() {
  const std::string model = internal::cpuinfo_field("model name", {});
  return model.empty() ? "unknown processor" : model;
}

bool cpu_has(const char* flag) {
  const std::string flags = " " + internal::cpuinfo_field("flags", {}) + " ";
  return flags.find(" " + std::string(flag) + " ") != std::string::npos;
}

}  // namespace capstan
