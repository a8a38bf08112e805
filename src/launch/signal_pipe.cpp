// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>

#include "launch/signal_pipe_internal.h"

namespace capstan::launch::internal {

namespace {

std::atomic<int> pipe_of_handler{-1};

void on_signal(int number) {
  const int saved = errno;
  const auto byte = static_cast<char>(number);
  const int descriptor = pipe_of_handler.load(std::memory_order_relaxed);
  if (descriptor >= 0) (void)!::write(descriptor, &byte, 1);
  errno = saved;
}

}  // namespace

SignalPipe::SignalPipe() {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) {
    capstan::throw_file_error("creating", "a pipe", errno);
  }
  read_end_ = capstan::Descriptor(ends[0]);
  write_end_ = capstan::Descriptor(ends[1]);
  pipe_of_handler = ends[1];
  struct sigaction action = {};
  action.sa_handler = &on_signal;
  action.sa_flags = SA_RESTART;
  ::sigemptyset(&action.sa_mask);
  for (size_t i = 0; i < kSignals.size(); ++i) {
    ::sigaction(kSignals[i], nullptr, &before_[i]);
    if (before_[i].sa_handler != SIG_IGN) ::sigaction(kSignals[i], &action, nullptr);
  }
}

SignalPipe::~SignalPipe() {
  for (size_t i = 0; i < kSignals.size(); ++i) ::sigaction(kSignals[i], &before_[i], nullptr);
  pipe_of_handler = -1;
}

std::optional<int> SignalPipe::next() {
  char byte = 0;
  if (::read(read_end_.get(), &byte, 1) != 1) return std::nullopt;
  return byte;
}

}  // namespace capstan::launch::internal
