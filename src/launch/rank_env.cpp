// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/launch/rank_env.h"

#include <fmt/format.h>
#include <sys/stat.h>

#include <limits>

#include "capstan/base/env.h"
#include "capstan/base/error.h"
#include "capstan/base/hash.h"
#include "launch/slurm_internal.h"

namespace capstan::launch {

namespace {

constexpr int kMostRanks = 1 << 20;
constexpr const char* kReading = "reading this rank's place from the environment";

// The names by which one launcher tells a rank its place; nullptr = it has none.
struct Names {
  const char* launcher;
  std::string rank, size, local_rank, local_size;
};

Names names_with(const std::string& prefix, const char* launcher) {
  return {launcher, prefix + "RANK", prefix + "WORLD_SIZE", prefix + "LOCAL_RANK",
          prefix + "LOCAL_WORLD_SIZE"};
}

const Names& open_mpi_names() {
  static const Names names = {"Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
                              "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"};
  return names;
}

const Names& slurm_names() {
  static const Names names = {"Slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID",
                              "SLURM_STEP_TASKS_PER_NODE"};
  return names;
}

bool has(const std::string& name) { return read_env(name.c_str()).has_value(); }

[[noreturn]] void throw_missing(const std::string& name, const std::string& beside,
                                const std::string& fix = "") {
  throw EnvError(
      {.module = "launch",
       .what = kReading,
       .got = beside + " without " + name,
       .need = "both",
       .fix = fix.empty() ? "Start the ranks with capstan train --nproc N, or set " + name : fix});
}

std::optional<int> maybe(const std::string& name, int64_t low, int64_t high) {
  const auto value = read_env_int(name.c_str(), low, high);
  if (!value) return std::nullopt;
  return static_cast<int>(*value);
}

int need(const std::string& name, int64_t low, int64_t high, const std::string& beside) {
  const auto value = maybe(name, low, high);
  if (!value) throw_missing(name, beside);
  return *value;
}

RankEnv read_place(const Names& names) {
  RankEnv env;
  env.launched = true;
  env.source = fmt::format("{} ({})", names.launcher, names.rank);
  env.world_size = need(names.size, 1, kMostRanks, names.rank);
  env.rank = need(names.rank, 0, env.world_size - 1, names.size);
  return env;
}

void read_local_place(const Names& names, RankEnv& env) {
  env.local_world_size = maybe(names.local_size, 1, env.world_size).value_or(env.world_size);
  if (env.world_size == 1 && !has(names.local_rank)) return;
  // Without LOCAL_RANK the other two may count nodes, not ranks (some cluster operators set them
  // so).
  env.local_rank = need(names.local_rank, 0, env.local_world_size - 1, names.rank);
}

// nullopt: not started by it, or as its only task, which may well start ranks of its own.
std::optional<RankEnv> read_open_mpi() {
  const Names& names = open_mpi_names();
  if (!has(names.rank) && !has(names.size)) return std::nullopt;
  RankEnv env = read_place(names);
  read_local_place(names, env);
  if (env.world_size == 1) return std::nullopt;
  env.job =
      read_env("PMIX_NAMESPACE").value_or(read_env("OMPI_MCA_ess_base_jobid").value_or("mpirun"));
  return env;
}

// Outside a step (in a batch script) the same names describe the script, not ranks.
std::optional<RankEnv> read_slurm() {
  const Names& names = slurm_names();
  if (!has("SLURM_STEP_ID") || !has(names.rank)) return std::nullopt;
  RankEnv env;
  if (need(names.size, 1, kMostRanks, names.rank) == 1) return std::nullopt;
  env = read_place(names);
  const int node = need("SLURM_NODEID", 0, kMostRanks, names.rank);
  const auto tasks = read_env(names.local_size.c_str());
  if (!tasks) throw_missing(names.local_size, names.rank);
  env.local_world_size = internal::tasks_of_node(*tasks, node, env.world_size);
  env.local_rank = need(names.local_rank, 0, env.local_world_size - 1, names.rank);
  env.job = read_env("SLURM_JOB_ID").value_or("") + "." + read_env("SLURM_STEP_ID").value_or("");
  if (const auto nodes = read_env("SLURM_STEP_NODELIST"))
    env.first_host = internal::first_host(*nodes);
  return env;
}

void check_agreement(const Names& plain, const RankEnv& env, const Names& names,
                     const std::optional<RankEnv>& other) {
  if (!other || (other->rank == env.rank && other->world_size == env.world_size)) return;
  const auto text = [](const Names& n, const RankEnv& e) {
    return fmt::format("{}={}, {}={}", n.rank, e.rank, n.size, e.world_size);
  };
  throw EnvError({.module = "launch",
                  .what = kReading,
                  .got = text(plain, env) + " and " + text(names, *other),
                  .need = "one place for one rank",
                  .fix = fmt::format("Unset {} and {}, or set them to what {} says", plain.rank,
                                     plain.size, names.launcher)});
}

// RANK and WORLD_SIZE without a sign of who set them: they must not contradict a launcher that is
// around, which may also fill in what they leave open.
RankEnv read_plain() {
  const Names plain = names_with("", "RANK and WORLD_SIZE");
  RankEnv env = read_place(plain);
  env.source = plain.launcher;
  for (const Names* names : {&open_mpi_names(), &slurm_names()}) {
    const auto other = names == &slurm_names() ? read_slurm() : read_open_mpi();
    check_agreement(plain, env, *names, other);
    if (!other || has(plain.local_rank)) continue;
    env.local_rank = other->local_rank;
    env.local_world_size = other->local_world_size;
    return env;
  }
  read_local_place(plain, env);
  return env;
}

// Where the ranks meet: as told; else, for ranks of a scheduler, on this machine or the first one,
// at a port below the ephemeral ones that all ranks derive from the job's name.
void read_master(const std::string& prefix, RankEnv& env) {
  const std::string address_name = prefix + "MASTER_ADDR", port_name = prefix + "MASTER_PORT";
  const auto port = maybe(port_name, 1, 65535);
  const std::string address = read_env(address_name.c_str()).value_or("");
  env.master_port = port.value_or(0);
  if (!address.empty()) env.master_addr = address;
  if (env.world_size == 1 || (port && !address.empty())) return;
  const bool is_derived = !env.job.empty();
  if (!port && !is_derived) throw_missing(port_name, prefix + "RANK");
  if (address.empty() && env.local_world_size < env.world_size) {
    if (env.first_host.empty())
      throw_missing(
          address_name, is_derived ? env.source : prefix + "RANK",
          is_derived ? "Set MASTER_ADDR to the host of rank 0, e.g. mpirun -x MASTER_ADDR" : "");
    env.master_addr = env.first_host;
  } else if (address.empty() && !is_derived) {
    throw_missing(address_name, prefix + "RANK");
  }
  constexpr int kFirstPort = 20000, kPorts = 10000;
  if (!port) env.master_port = kFirstPort + static_cast<int>(xxh3_64(env.job) % kPorts);
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

// The first that is there, inner launchers before outer ones: a launcher started by Slurm or
// mpirun leaves their variables in the environment of its ranks.
RankEnv find_place(const std::string& own) {
  if (!own.empty() || has("TORCHELASTIC_RUN_ID")) {
    const Names names = names_with(own, own.empty() ? "torchrun" : "capstan");
    if (has(names.rank) || has(names.size)) {
      RankEnv env = read_place(names);
      read_local_place(names, env);
      return env;
    }
  }
  if (has("RANK") || has("WORLD_SIZE")) return read_plain();
  if (auto env = read_open_mpi()) return *env;
  return read_slurm().value_or(RankEnv{});
}

}  // namespace

RankEnv read_rank_env() {
  const bool has_own = has("CAPSTAN_RANK") || has("CAPSTAN_WORLD_SIZE");
  const std::string prefix = has_own ? "CAPSTAN_" : "";
  RankEnv env = find_place(prefix);
  if (!env.launched) return env;
  read_master(prefix, env);
  if (has_own && env.rank == 0) env.store_fd = read_store_descriptor();
  if (const auto grace = read_env_int("CAPSTAN_GRACE_S", 0, 1000000)) {
    env.grace_s = static_cast<double>(*grace);
  }
  return env;
}

}  // namespace capstan::launch
