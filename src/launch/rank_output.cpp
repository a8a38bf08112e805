// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <span>

#include "launch/rank_output_internal.h"

namespace capstan::launch::internal {

namespace {

using capstan::Descriptor;

// False when the target is gone (closed terminal).
bool write_whole(int target, std::span<const char> bytes) {
  while (!bytes.empty()) {
    const ssize_t done = ::write(target, bytes.data(), bytes.size());
    if (done < 0 && errno == EINTR) continue;
    if (done < 0 && errno == EAGAIN) {
      pollfd wait = {target, POLLOUT, 0};
      if (::poll(&wait, 1, 1000) > 0) continue;
      return true;  // a stalled console loses output; the log has it
    }
    if (done <= 0) return false;
    bytes = bytes.subspan(static_cast<size_t>(done));
  }
  return true;
}

}  // namespace

RankOutput::RankOutput(const Path& log, int64_t log_limit_bytes, int console)
    : console_(console), log_(log, log_limit_bytes) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) {
    capstan::throw_file_error("creating", "a pipe", errno);
  }
  read_end_ = Descriptor(ends[0]);
  write_end_ = Descriptor(ends[1]);
  ::fcntl(read_end_.get(), F_SETFL, O_NONBLOCK);
  stop_ = Descriptor(::eventfd(0, EFD_CLOEXEC));
  if (stop_.get() < 0) capstan::throw_file_error("creating", "an eventfd", errno);
}

void RankOutput::start() {
  write_end_.reset();
  thread_ = std::thread([this] { pump(); });
}

RankOutput::~RankOutput() {
  if (!thread_.joinable()) return;
  const uint64_t one = 1;
  (void)!::write(stop_.get(), &one, sizeof(one));
  thread_.join();
}

// Until the end of the pipe, or, once told to stop, until it is empty: a process that left the
// rank's group may keep it open for ever.
void RankOutput::pump() {
  sigset_t all;
  ::sigfillset(
      &all);  // signals belong to the main thread; SIGPIPE of a closed console becomes EPIPE
  ::pthread_sigmask(SIG_BLOCK, &all, nullptr);
  std::array<char, 64 << 10> buffer;
  bool to_console = console_ >= 0;
  for (;;) {
    const ssize_t got = ::read(read_end_.get(), buffer.data(), buffer.size());
    if (got == 0) return;
    if (got > 0) {
      const std::span<const char> bytes(buffer.data(), static_cast<size_t>(got));
      log_.write({bytes.data(), bytes.size()});
      to_console = to_console && write_whole(console_, bytes);
      continue;
    }
    if (errno == EINTR) continue;
    if (errno != EAGAIN) return;
    std::array<pollfd, 2> wait = {pollfd{read_end_.get(), POLLIN, 0},
                                  pollfd{stop_.get(), POLLIN, 0}};
    if (::poll(wait.data(), wait.size(), -1) < 0 && errno != EINTR) return;
    if (wait[1].revents != 0 && wait[0].revents == 0) return;
  }
}

}  // namespace capstan::launch::internal
