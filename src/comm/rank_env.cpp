// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <sys/socket.h>
#include <sys/stat.h>

#include <fmt/format.h>

#include "capstan/base/env.h"
#include "capstan/comm/world.h"

namespace capstan::comm {
namespace {

constexpr int64_t kMaxRanks = int64_t{1} << 20;

int64_t need_int(const char* name, int64_t low, int64_t high) {
  if (const auto value = read_env_int(name, low, high)) return *value;
  throw EnvError(ErrorText{
      .module = "comm",
      .what = "reading the rank of this process from the environment",
      .got = fmt::format("no {}", name),
      .need = "RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT",
      .why = "some of them are set, so a launcher seems to have started this process",
      .fix = "Start ranks with `capstan launch` or torchrun, or unset all of them"});
}

void check_below(const char* name, int value, const char* limit_name, int limit) {
  if (value < limit) return;
  throw EnvError(ErrorText{.module = "comm",
                           .what = fmt::format("reading {} from the environment", name),
                           .got = std::to_string(value),
                           .need = fmt::format("less than {} = {}", limit_name, limit)});
}

int read_store_descriptor() {
  const auto descriptor = static_cast<int>(need_int("CAPSTAN_STORE_FD", 0, 1 << 20));
  struct stat info {};
  if (::fstat(descriptor, &info) != 0 || !S_ISSOCK(info.st_mode))
    throw EnvError(
        ErrorText{.module = "comm",
                  .what = "reading CAPSTAN_STORE_FD from the environment",
                  .got = fmt::format("descriptor {}, which is not an open socket", descriptor),
                  .need = "a listening socket inherited from the launcher",
                  .fix = "Unset CAPSTAN_STORE_FD"});
  return descriptor;
}

}  // namespace

RankEnv read_rank_env() {
  RankEnv env;
  const bool launched = read_env("RANK") || read_env("WORLD_SIZE") || read_env("LOCAL_RANK");
  if (!launched) return env;
  env.size = static_cast<int>(need_int("WORLD_SIZE", 1, kMaxRanks));
  env.rank = static_cast<int>(need_int("RANK", 0, kMaxRanks));
  check_below("RANK", env.rank, "WORLD_SIZE", env.size);
  env.local_rank = static_cast<int>(need_int("LOCAL_RANK", 0, kMaxRanks));
  env.local_size = static_cast<int>(need_int("LOCAL_WORLD_SIZE", 1, env.size));
  check_below("LOCAL_RANK", env.local_rank, "LOCAL_WORLD_SIZE", env.local_size);
  if (env.size == 1) return env;
  env.master_port = static_cast<int>(need_int("MASTER_PORT", 1, 65535));
  if (const auto address = read_env("MASTER_ADDR"); address && !address->empty())
    env.master_addr = *address;
  else
    (void)need_int("MASTER_ADDR", 0, 0);
  if (env.rank == 0 && read_env("CAPSTAN_STORE_FD")) env.store_descriptor = read_store_descriptor();
  return env;
}

}  // namespace capstan::comm
