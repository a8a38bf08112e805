// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <linux/close_range.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>

#include "capstan/base/log.h"
#include "launch/guardian_internal.h"

namespace capstan::launch::internal {

namespace {

constexpr int kMostGroups = 4096;

// Runs in the forked child of a program that may have threads: only async-signal-safe calls.
[[noreturn]] void guard(int pipe) {
  ::setsid();  // away from the terminal's signals
  for (const int number : {SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2, SIGPIPE}) {
    ::signal(number, SIG_IGN);
  }
  sigset_t none;
  ::sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);
  const int null = ::open("/dev/null", O_RDWR);
  for (int number = 0; number < 3; ++number) ::dup2(null, number);
  ::dup2(pipe, 3);
  ::close_range(4, ~0u, 0);
  static pid_t groups[kMostGroups];
  int count = 0;
  for (;;) {
    pid_t number = 0;
    const ssize_t got = ::read(3, &number, sizeof(number));
    if (got < 0 && errno == EINTR) continue;
    if (got != sizeof(number)) break;
    if (number > 0 && count < kMostGroups) groups[count++] = number;
    for (int i = 0; number < 0 && i < count; ++i) {
      if (groups[i] == -number) groups[i--] = groups[--count];
    }
  }
  for (int i = 0; i < count; ++i) ::kill(-groups[i], SIGKILL);
  ::_exit(0);
}

}  // namespace

Guardian::Guardian() {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) {
    capstan::throw_file_error("creating", "a pipe", errno);
  }
  const capstan::Descriptor read_end(ends[0]);
  pipe_ = capstan::Descriptor(ends[1]);
  process_ = ::fork();
  if (process_ == 0) guard(ends[0]);
  if (process_ < 0) {
    log::warning("launch", "no guardian process: children of ranks may survive a killed launcher");
    pipe_.reset();
  }
}

Guardian::~Guardian() {
  pipe_.reset();
  if (process_ > 0) {
    while (::waitpid(process_, nullptr, 0) < 0 && errno == EINTR) {
    }
  }
}

void Guardian::watch(pid_t group) { tell(group); }
void Guardian::forget(pid_t group) { tell(-group); }

void Guardian::tell(pid_t number) {
  if (pipe_.get() < 0) return;
  // If someone killed the guardian, writing must not kill the launcher too.
  sigset_t block, before;
  ::sigemptyset(&block);
  ::sigaddset(&block, SIGPIPE);
  ::pthread_sigmask(SIG_BLOCK, &block, &before);
  if (::write(pipe_.get(), &number, sizeof(number)) < 0 && errno == EPIPE) {
    const timespec now = {};
    ::sigtimedwait(&block, nullptr, &now);
    pipe_.reset();
  }
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

}  // namespace capstan::launch::internal
