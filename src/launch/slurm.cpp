// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <charconv>
#include <cstdint>
#include <system_error>

#include "capstan/base/error.h"
#include "capstan/base/text.h"
#include "launch/slurm_internal.h"

namespace capstan::launch::internal {
namespace {

constexpr size_t kMostText = 1 << 20, kMostName = 255;

[[noreturn]] void refuse(const char* name, std::string_view text, const char* need) {
  throw EnvError({.module = "launch",
                  .what = std::string("reading the environment variable ") + name,
                  .got = quote(text, 200),
                  .need = need});
}

// Takes a number of 1..most off the front of the text; 0 when there is none.
int take_number(std::string_view& text, int most) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || value < 1 || value > most) return 0;
  text.remove_prefix(static_cast<size_t>(end - text.data()));
  return value;
}

bool take(std::string_view& text, std::string_view prefix) {
  if (!text.starts_with(prefix)) return false;
  text.remove_prefix(prefix.size());
  return true;
}

bool is_name(std::string_view text) {
  constexpr std::string_view kAllowed =
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._";
  return text.find_first_not_of(kAllowed) == std::string_view::npos;
}

}  // namespace

int tasks_of_node(std::string_view text, int node, int most) {
  constexpr const char* kName = "SLURM_STEP_TASKS_PER_NODE";
  const std::string_view whole = text;
  if (text.size() > kMostText) refuse(kName, text, "a list of task counts");
  for (int64_t first = 0;;) {
    const int tasks = take_number(text, most);
    if (tasks == 0) refuse(kName, whole, "counts from 1 to the number of tasks, as in 2(x3),1");
    int repeat = 1;
    if (take(text, "(x")) {
      repeat = take_number(text, 1 << 20);
      if (repeat == 0 || !take(text, ")")) refuse(kName, whole, "repeats in the form 2(x3)");
    }
    first += repeat;
    if (node < first) return tasks;
    if (!take(text, ",")) refuse(kName, whole, "an entry for this node (SLURM_NODEID)");
  }
}

std::string first_host(std::string_view text) {
  constexpr const char* kName = "SLURM_STEP_NODELIST";
  const std::string_view whole = text;
  std::string host;
  while (!text.empty() && text.front() != ',') {
    const size_t end = std::min(text.find_first_of("[,"), text.size());
    std::string_view part = text.substr(0, end);
    text.remove_prefix(end);
    if (!is_name(part)) refuse(kName, whole, "names of hosts, as in a[01-03,7],b");
    host += part;
    if (!take(text, "[")) continue;
    const size_t close = text.find(']');
    part = text.substr(0, std::min(close, text.find_first_of("-,")));
    if (close == std::string_view::npos || part.empty() ||
        part.find_first_not_of("0123456789") != std::string_view::npos)
      refuse(kName, whole, "ranges of numbers, as in a[01-03,7],b");
    host += part;
    text.remove_prefix(close + 1);
  }
  if (host.empty() || host.size() > kMostName) refuse(kName, whole, "names of hosts");
  return host;
}

}  // namespace capstan::launch::internal
