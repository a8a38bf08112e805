// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <linux/close_range.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "capstan/base/env.h"
#include "capstan/base/error.h"
#include "capstan/base/text.h"
#include "launch/rank_process_internal.h"

namespace capstan::launch::internal {

namespace {

using capstan::Descriptor;

// Through syscall(): the C library's own header of Debian 12 cannot be linked from C++.
// Close-on-exec by nature.
int open_pidfd(pid_t pid) { return static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)); }

std::vector<char*> pointers(const std::vector<std::string>& texts) {
  std::vector<char*> out;
  for (const std::string& text : texts) out.push_back(const_cast<char*>(text.c_str()));
  out.push_back(nullptr);
  return out;
}

struct ChildSetup {
  const RankCommand& command;
  char* const* arguments;
  char* const* environment;
  pid_t parent;
  int null, report;
};

// In the forked child, which may be a copy of a program with threads: only async-signal-safe calls.
[[noreturn]] void become_rank(const ChildSetup& setup) {
  ::setpgid(0, 0);
  // The signal comes when the thread that forked ends; a launcher that ended before this line is
  // seen by getppid.
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != setup.parent) ::_exit(1);
  for (const int number : {SIGTERM, SIGINT, SIGUSR1, SIGUSR2, SIGPIPE}) ::signal(number, SIG_DFL);
  sigset_t none;
  ::sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);
  ::dup2(setup.null, 0);
  ::dup2(setup.command.out, 1);
  ::dup2(setup.command.err, 2);
  // Also what the launcher itself inherited or a library opened carelessly.
  ::close_range(3, ~0u, CLOSE_RANGE_CLOEXEC);
  if (setup.command.inherit >= 0) ::fcntl(setup.command.inherit, F_SETFD, 0);
  ::execvpe(setup.arguments[0], setup.arguments, setup.environment);
  const int code = errno;
  (void)!::write(setup.report, &code, sizeof(code));
  ::_exit(127);
}

[[noreturn]] void throw_start(const RankCommand& command, int code) {
  throw EnvError({.module = "launch",
                  .what = "starting rank " + std::to_string(command.rank) + " with " +
                          quote(command.arguments[0], 4096),
                  .got = std::strerror(code)});
}

}  // namespace

RankProcess RankProcess::start(const RankCommand& command) {
  const std::vector<char*> arguments = pointers(command.arguments);
  const std::vector<char*> environment = pointers(command.environment);
  const Descriptor null = capstan::open_file("/dev/null", O_RDWR);
  int ends[2];  // closed by a successful exec, or carries the errno of a failed one
  if (::pipe2(ends, O_CLOEXEC) != 0) throw_start(command, errno);
  const Descriptor read_end(ends[0]);
  Descriptor write_end(ends[1]);
  const ChildSetup setup = {command,    arguments.data(), environment.data(),
                            ::getpid(), null.get(),       write_end.get()};
  RankProcess process;
  process.pid_ = ::fork();
  if (process.pid_ == 0) become_rank(setup);
  if (process.pid_ < 0) throw_start(command, errno);
  ::setpgid(process.pid_,
            process.pid_);  // also here: whoever is first, nobody signals the wrong group
  write_end.reset();
  int code = 0;
  ssize_t got = -1;
  while ((got = ::read(read_end.get(), &code, sizeof(code))) < 0 && errno == EINTR) {
  }
  if (got == sizeof(code)) {
    while (::waitpid(process.pid_, nullptr, 0) < 0 && errno == EINTR) {
    }
    throw_start(command, code);
  }
  process.pidfd_ = Descriptor(open_pidfd(process.pid_));
  if (process.pidfd_.get() < 0) {
    const int reason = errno;
    process.kill_group();
    ::waitpid(process.pid_, nullptr, 0);
    throw_start(command, reason);
  }
  return process;
}

std::optional<Outcome> RankProcess::peek() const {
  siginfo_t info = {};
  if (::waitid(P_PIDFD, static_cast<id_t>(pidfd_.get()), &info, WEXITED | WNOHANG | WNOWAIT) != 0) {
    return std::nullopt;
  }
  if (info.si_pid == 0) return std::nullopt;
  Outcome outcome = {.time_ns = monotonic_ns()};
  (info.si_code == CLD_EXITED ? outcome.exit_code : outcome.signal) = info.si_status;
  return outcome;
}

void RankProcess::signal(int number) const {
  // The whole group, as a terminal does it: the rank may stand behind a shell. The leader is not
  // reaped yet, so the number cannot belong to anyone else.
  (void)::kill(-pid_, number);
  // A stopped rank would not see it; SIGCONT does nothing to a running one.
  const bool is_stop = number == SIGTERM || number == SIGINT || number == SIGHUP;
  if (is_stop) (void)::kill(-pid_, SIGCONT);
}

void RankProcess::kill_group() const { (void)::kill(-pid_, SIGKILL); }

void RankProcess::reap() {
  while (::waitpid(pid_, nullptr, 0) < 0 && errno == EINTR) {
  }
  // Children of the rank were handed to this process as their subreaper. They are killed, but one
  // that sleeps in the kernel may take its time; then it stays a zombie until this process ends.
  const int64_t deadline = monotonic_ns() + 1000000000;
  while (monotonic_ns() < deadline) {
    siginfo_t info = {};
    const int code = ::waitid(P_PGID, static_cast<id_t>(pid_), &info, WEXITED | WNOHANG);
    if (code != 0) return;  // ECHILD: none left
    if (info.si_pid == 0) ::poll(nullptr, 0, 5);
  }
}

}  // namespace capstan::launch::internal
