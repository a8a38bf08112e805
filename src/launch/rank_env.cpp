// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/launch/rank_env.h"

#include <fmt/format.h>
#include <sys/stat.h>

#include <limits>

#include "capstan/base/env.h"
#include "capstan/base/error.h"
#include "capstan/base/text.h"

namespace capstan::launch {

namespace {

constexpr int kMostRanks = 1 << 20;

[[noreturn]] void throw_missing(const std::string& name, const std::string& beside) {
  throw EnvError({.module = "launch",
                  .what = "reading this rank's place from the environment",
                  .got = beside + " without " + name,
                  .need = "both",
                  .fix = "Start the ranks with capstan train --nproc N, or set " + name});
}

// One family of names: with prefix "CAPSTAN_" or without.
class Reader {
 public:
  explicit Reader(std::string prefix) : prefix_(std::move(prefix)) {}
  [[nodiscard]] std::string name(const char* key) const { return prefix_ + key; }
  [[nodiscard]] bool has(const char* key) const { return read_env(name(key).c_str()).has_value(); }
  [[nodiscard]] std::optional<int> maybe(const char* key, int64_t low, int64_t high) const {
    const auto value = read_env_int(name(key).c_str(), low, high);
    if (!value) return std::nullopt;
    return static_cast<int>(*value);
  }
  [[nodiscard]] int need(const char* key, int64_t low, int64_t high, const char* beside) const {
    const auto value = maybe(key, low, high);
    if (!value) throw_missing(name(key), name(beside));
    return *value;
  }

 private:
  std::string prefix_;
};

void read_place(const Reader& reader, RankEnv& env) {
  env.world_size = reader.need("WORLD_SIZE", 1, kMostRanks, "RANK");
  env.rank = reader.need("RANK", 0, env.world_size - 1, "WORLD_SIZE");
  env.local_world_size =
      reader.maybe("LOCAL_WORLD_SIZE", 1, env.world_size).value_or(env.world_size);
  if (env.world_size == 1 && !reader.has("LOCAL_RANK")) return;
  // Without LOCAL_RANK the other two may count nodes, not ranks (some cluster operators set them
  // so).
  env.local_rank = reader.need("LOCAL_RANK", 0, env.local_world_size - 1, "RANK");
}

void read_master(const Reader& reader, RankEnv& env) {
  const auto port = reader.maybe("MASTER_PORT", 1, 65535);
  const auto address = read_env(reader.name("MASTER_ADDR").c_str());
  if (env.world_size > 1 && !port) throw_missing(reader.name("MASTER_PORT"), reader.name("RANK"));
  if (env.world_size > 1 && address.value_or("").empty()) {
    throw_missing(reader.name("MASTER_ADDR"), reader.name("RANK"));
  }
  env.master_port = port.value_or(0);
  if (!address.value_or("").empty()) env.master_addr = *address;
}

std::optional<int> read_store_descriptor() {
  const auto number = read_env_int("CAPSTAN_STORE_FD", 3, std::numeric_limits<int>::max());
  if (!number) return std::nullopt;
  struct stat info = {};
  if (::fstat(static_cast<int>(*number), &info) != 0 || !S_ISSOCK(info.st_mode)) {
    throw EnvError({.module = "launch",
                    .what = "reading the environment variable CAPSTAN_STORE_FD",
                    .got = fmt::format("{}, which is no open socket", *number),
                    .need = "the listening socket the launcher passes on",
                    .fix = "Unset CAPSTAN_STORE_FD"});
  }
  return static_cast<int>(*number);
}

}  // namespace

RankEnv read_rank_env() {
  const Reader own("CAPSTAN_"), plain("");
  const bool has_own = own.has("RANK") || own.has("WORLD_SIZE");
  const Reader& reader = has_own ? own : plain;
  RankEnv env;
  if (!reader.has("RANK") && !reader.has("WORLD_SIZE")) return env;
  env.launched = true;
  read_place(reader, env);
  read_master(reader, env);
  if (has_own && env.rank == 0) env.store_fd = read_store_descriptor();
  if (const auto grace = read_env_int("CAPSTAN_GRACE_S", 0, 1000000)) {
    env.grace_s = static_cast<double>(*grace);
  }
  return env;
}

}  // namespace capstan::launch
