// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/trainer/stop.h"

#include <array>
#include <atomic>
#include <csignal>

namespace capstan::trainer {
namespace {

constexpr std::array kSignals = {SIGTERM, SIGINT, SIGUSR1};
std::atomic<int> requested{0};
static_assert(std::atomic<int>::is_always_lock_free);
std::array<struct sigaction, kSignals.size()> previous;

extern "C" void on_stop_signal(int signal) {
  if (requested.exchange(signal) == 0) return;
  std::signal(signal, SIG_DFL);  // the second one ends the process
  std::raise(signal);
}

}  // namespace

StopSignals::StopSignals() {
  struct sigaction action {};
  action.sa_handler = on_stop_signal;
  action.sa_flags = SA_RESTART | SA_NODEFER;
  for (size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &action, &previous[i]);
}

StopSignals::~StopSignals() {
  for (size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &previous[i], nullptr);
}

int stop_signal() { return requested; }
void request_stop(int signal) { requested = signal; }
void clear_stop() { requested = 0; }

}  // namespace capstan::trainer
