// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/launch/local.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <memory>

#include "capstan/base/env.h"
#include "capstan/base/error.h"
#include "capstan/base/log.h"
#include "capstan/launch/rank_env.h"
#include "launch/cause_internal.h"
#include "launch/guardian_internal.h"
#include "launch/listen_internal.h"
#include "launch/rank_output_internal.h"
#include "launch/rank_process_internal.h"
#include "launch/signal_pipe_internal.h"

extern char** environ;

namespace capstan::launch {

namespace {

using internal::Outcome;
using internal::RankProcess;
using internal::RankRecord;

constexpr int64_t kNever = INT64_MAX;
// A rank that lost its connection may be seen before the one whose end cut it.
constexpr double kSettleSeconds = 0.5;
constexpr int kMostRanks = 4096;
constexpr int64_t kLeastLogBytes = 4096;

int64_t after(double seconds) { return monotonic_ns() + std::llround(seconds * 1e9); }

// Children of ranks that lose their parent come to this process, not to init, so that it can end
// them.
class Subreaper {
 public:
  Subreaper() {
    ::prctl(PR_GET_CHILD_SUBREAPER, &before_);
    ::prctl(PR_SET_CHILD_SUBREAPER, 1);
  }
  ~Subreaper() { ::prctl(PR_SET_CHILD_SUBREAPER, before_); }
  Subreaper(const Subreaper&) = delete;
  Subreaper& operator=(const Subreaper&) = delete;

 private:
  int before_ = 0;
};

void check_launch(const LocalLaunch& launch) {
  const auto refuse = [](std::string what, std::string got, std::string need) {
    throw ConfigError({.module = "launch",
                       .what = std::move(what),
                       .got = std::move(got),
                       .need = std::move(need)});
  };
  if (launch.command.empty()) refuse("starting ranks", "no command", "a program to run");
  if (launch.nproc < 1 || launch.nproc > kMostRanks) {
    refuse("starting ranks", fmt::format("nproc {}", launch.nproc),
           fmt::format("1 to {}", kMostRanks));
  }
  if (launch.log_limit_bytes < kLeastLogBytes) {
    refuse("starting ranks", fmt::format("a log limit of {} bytes", launch.log_limit_bytes),
           fmt::format("at least {}", kLeastLogBytes));
  }
  if (!(launch.grace_s >= 0 && launch.grace_s <= 1e6 && launch.crash_grace_s >= 0 &&
        launch.crash_grace_s <= 1e6)) {
    refuse("starting ranks",
           fmt::format("grace {} s and {} s", launch.grace_s, launch.crash_grace_s),
           "0 to 1,000,000 s each");
  }
  if (!launch.allow_nested && read_env("CAPSTAN_RANK")) {
    refuse("starting ranks", "a process that is rank " + *read_env("CAPSTAN_RANK") + " itself",
           "one launcher around the ranks");
  }
}

std::map<std::string, std::string> common_environment(const LocalLaunch& launch, int port) {
  std::map<std::string, std::string> out;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string text = *entry;
    const size_t equals = text.find('=', 1);
    if (equals != std::string::npos) out[text.substr(0, equals)] = text.substr(equals + 1);
  }
  for (const char* name : {"CAPSTAN_STORE_FD", "CAPSTAN_CONSOLE"}) out.erase(name);
  for (const auto& [name, value] : launch.environment) out[name] = value;
  if (!out.contains("OMP_NUM_THREADS")) {
    const int threads = std::max(1, allowed_physical_cores() / launch.nproc);
    out["OMP_NUM_THREADS"] = std::to_string(threads);
    log::info("launch", "{} ranks, {} threads each (OMP_NUM_THREADS)", launch.nproc, threads);
  }
  for (const char* prefix : {"", "CAPSTAN_"}) {
    const std::string name = prefix;
    out[name + "WORLD_SIZE"] = out[name + "LOCAL_WORLD_SIZE"] = std::to_string(launch.nproc);
    out[name + "MASTER_ADDR"] = launch.master_addr;
    out[name + "MASTER_PORT"] = std::to_string(port);
  }
  out["CAPSTAN_GRACE_S"] = std::to_string(std::llround(launch.grace_s));
  return out;
}

std::vector<std::string> flatten(const std::map<std::string, std::string>& environment) {
  std::vector<std::string> out;
  for (const auto& [name, value] : environment) out.push_back(name + "=" + value);
  return out;
}

// Starts the ranks in its constructor; run() watches them to their end. Kills what is left when it
// is destroyed.
class Supervisor {
 public:
  explicit Supervisor(const LocalLaunch& launch) : launch_(launch) {
    try {
      start_ranks();
    } catch (...) {
      kill_all();
      throw;
    }
  }
  ~Supervisor() { kill_all(); }
  Supervisor(const Supervisor&) = delete;
  Supervisor& operator=(const Supervisor&) = delete;

  LaunchResult run();

 private:
  struct Rank {
    RankProcess process;
    RankRecord record;
    bool is_alive = true;
  };

  void start_ranks();
  void start_rank(int rank, std::map<std::string, std::string> environment);
  void wait_for_something();
  void handle_signals();
  void collect_ended();
  void note_end(const RankRecord& record);
  void check_deadlines();
  void pass_on(int number);
  void stop_ranks(int number, double grace_s);
  void kill_all() noexcept;
  void end_rank(Rank& rank, const Outcome& outcome);
  [[nodiscard]] int count_alive() const;
  [[nodiscard]] LaunchResult make_result();

  const LocalLaunch& launch_;
  Subreaper subreaper_;
  internal::SignalPipe signals_;
  internal::Guardian guardian_;
  internal::Listener listener_;
  std::vector<Rank> ranks_;
  std::vector<std::unique_ptr<internal::RankOutput>> outputs_;
  bool stopping_ = false, hard_stop_ = false;
  int stop_signal_ = 0;
  int64_t stop_at_ = kNever;   // stop because of a failure
  int64_t kill_at_ = kNever;   // end of the grace
  int64_t early_at_ = kNever;  // ranks that left with 0 must have been followed by then
};

void Supervisor::start_ranks() {
  create_directories_durable(launch_.log_directory);
  listener_ = internal::listen_on_free_port(launch_.master_addr);
  const auto environment = common_environment(launch_, listener_.port);
  for (int rank = 0; rank < launch_.nproc; ++rank) start_rank(rank, environment);
}

void Supervisor::start_rank(int rank, std::map<std::string, std::string> environment) {
  const Path folder = std::filesystem::absolute(launch_.log_directory) / std::to_string(rank);
  create_directories_durable(folder);
  for (const char* stale : {"error.json", "done"}) std::filesystem::remove(folder / stale);
  for (const char* prefix : {"", "CAPSTAN_"}) {
    const std::string name = prefix;
    environment[name + "RANK"] = environment[name + "LOCAL_RANK"] = std::to_string(rank);
  }
  environment["CAPSTAN_ERROR_FILE"] = (folder / "error.json").native();
  internal::RankCommand command = {.rank = rank, .arguments = launch_.command};
  const bool tee = rank == 0 && launch_.tee_rank0;
  const auto add_output = [&](const char* name, int console) -> internal::RankOutput& {
    return *outputs_.emplace_back(std::make_unique<internal::RankOutput>(
        folder / name, launch_.log_limit_bytes, tee ? console : -1));
  };
  internal::RankOutput& out = add_output("stdout.log", STDOUT_FILENO);
  internal::RankOutput& err = add_output("stderr.log", STDERR_FILENO);
  command.out = out.write_end();
  command.err = err.write_end();
  if (tee && ::isatty(STDOUT_FILENO) == 1) environment["CAPSTAN_CONSOLE"] = "terminal";
  if (rank == 0) {
    command.inherit = listener_.socket.get();
    environment["CAPSTAN_STORE_FD"] = std::to_string(command.inherit);
  }
  command.environment = flatten(environment);
  RankProcess process = RankProcess::start(command);
  guardian_.watch(process.pid());
  ranks_.push_back({std::move(process), {.rank = rank, .log_directory = folder}});
  out.start();
  err.start();
  // Only rank 0 may hold it: connections to a dead rank 0 must be refused, not queued here.
  if (rank == 0) listener_.socket.reset();
}

int Supervisor::count_alive() const {
  return static_cast<int>(
      std::count_if(ranks_.begin(), ranks_.end(), [](const Rank& rank) { return rank.is_alive; }));
}

LaunchResult Supervisor::run() {
  while (count_alive() > 0) {
    wait_for_something();
    handle_signals();
    collect_ended();
    check_deadlines();
  }
  outputs_.clear();  // when all that was printed has been copied
  return make_result();
}

void Supervisor::wait_for_something() {
  std::vector<pollfd> wait = {{signals_.descriptor(), POLLIN, 0}};
  for (const Rank& rank : ranks_) {
    if (rank.is_alive) wait.push_back({rank.process.descriptor(), POLLIN, 0});
  }
  const int64_t next = std::min({stop_at_, kill_at_, early_at_});
  int64_t milliseconds = -1;
  if (next != kNever) {
    milliseconds = std::clamp<int64_t>((next - monotonic_ns()) / 1000000 + 1, 0, 1000000);
  }
  (void)::poll(wait.data(), wait.size(), static_cast<int>(milliseconds));
}

void Supervisor::handle_signals() {
  while (const std::optional<int> number = signals_.next()) {
    if (*number == SIGUSR1 || *number == SIGUSR2) {
      pass_on(*number);
    } else if (stop_signal_ == 0) {
      stop_signal_ = *number;
      log::info("launch", "passing {} on to the ranks; a second one stops at once",
                *number == SIGINT    ? "Ctrl-C"
                : *number == SIGTERM ? "SIGTERM"
                                     : "SIGHUP");
      stop_ranks(*number, launch_.grace_s);
    } else {
      stop_signal_ = *number;
      hard_stop_ = true;
      kill_at_ = 0;
    }
  }
}

void Supervisor::pass_on(int number) {
  for (Rank& rank : ranks_) {
    if (rank.is_alive) rank.process.signal(number);
  }
}

void Supervisor::stop_ranks(int number, double grace_s) {
  kill_at_ = std::min(kill_at_, after(grace_s));
  stop_at_ = early_at_ = kNever;
  if (std::exchange(stopping_, true))
    return;  // the ranks were told; a second signal would cut a save short
  for (Rank& rank : ranks_) {
    if (!rank.is_alive) continue;
    rank.record.signalled_ns = monotonic_ns();
    rank.record.last_signal = number;
  }
  pass_on(number);
}

void Supervisor::collect_ended() {
  // All of them first: of two that ended at once, neither may be taken for a consequence of our
  // signal.
  std::vector<const RankRecord*> ended;
  for (Rank& rank : ranks_) {
    if (!rank.is_alive) continue;
    if (const auto outcome = rank.process.peek()) {
      end_rank(rank, *outcome);
      ended.push_back(&rank.record);
    }
  }
  for (const RankRecord* record : ended) note_end(*record);
}

void Supervisor::end_rank(Rank& rank, const Outcome& outcome) {
  rank.record.outcome = outcome;
  rank.record.declared_done = is_declared_done(rank.record.log_directory / "error.json");
  rank.process.kill_group();
  guardian_.forget(rank.process.pid());
  rank.process.reap();
  rank.is_alive = false;
}

void Supervisor::note_end(const RankRecord& record) {
  const Outcome& outcome = record.outcome;
  const bool is_preempted = outcome.signal == 0 && outcome.exit_code == exit_codes::kPreempted;
  if (outcome.is_clean() || is_preempted) {
    if (!record.declared_done && !stopping_)
      early_at_ = std::min(early_at_, after(launch_.grace_s));
    return;
  }
  if (stopping_) {
    kill_at_ = std::min(kill_at_, after(launch_.crash_grace_s));
    return;
  }
  const auto error = read_error_file(record.log_directory / "error.json");
  const bool settle = error && error->is_cascade;
  stop_at_ = std::min(stop_at_, settle ? after(kSettleSeconds) : 0);
}

void Supervisor::check_deadlines() {
  if (count_alive() == 0) return;
  const int64_t now = monotonic_ns();
  if (now >= early_at_) {
    for (Rank& rank : ranks_) {
      rank.record.left_early = !rank.is_alive && !rank.record.declared_done;
    }
    stop_at_ = 0;
  }
  if (now >= stop_at_) stop_ranks(SIGTERM, launch_.crash_grace_s);
  if (now < kill_at_) return;
  for (Rank& rank : ranks_) {
    if (!rank.is_alive) continue;
    rank.record.killed = !hard_stop_;
    rank.record.last_signal = SIGKILL;
    if (rank.record.signalled_ns == 0) rank.record.signalled_ns = now;
    rank.process.kill_group();
  }
  kill_at_ = kNever;
}

void Supervisor::kill_all() noexcept {
  for (Rank& rank : ranks_) {
    if (!rank.is_alive) continue;
    rank.process.kill_group();
    guardian_.forget(rank.process.pid());
    rank.process.reap();
    rank.is_alive = false;
  }
}

LaunchResult Supervisor::make_result() {
  LaunchResult result = {.stop_signal = stop_signal_};
  std::vector<RankRecord> records;
  bool is_preempted = false, is_clean = true;
  for (const Rank& rank : ranks_) {
    records.push_back(rank.record);
    const Outcome& outcome = rank.record.outcome;
    if (rank.record.killed) result.killed.push_back(rank.record.rank);
    is_clean = is_clean && outcome.is_clean();
    is_preempted |= outcome.signal == 0 && outcome.exit_code == exit_codes::kPreempted;
  }
  result.failure = internal::find_cause(records);
  if (result.failure) {
    const int code = result.failure->exit_code;
    const bool is_usable = result.failure->signal == 0 && code > 0 && code < 126;
    result.exit_code = is_usable ? code : exit_codes::kWorkerFailure;
  } else if (hard_stop_ || (stop_signal_ != 0 && !is_clean && !is_preempted)) {
    result.exit_code = 128 + stop_signal_;
  } else if (is_preempted) {
    result.exit_code = exit_codes::kPreempted;
  } else if (!is_clean) {
    result.exit_code = exit_codes::kWorkerFailure;
  }
  return result;
}

}  // namespace

LaunchResult run_local(const LocalLaunch& launch) {
  check_launch(launch);
  return Supervisor(launch).run();
}

}  // namespace capstan::launch
