// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/device/accelerator.h"

#include <atomic>
#include <cstdlib>

#include "capstan/base/check.h"

namespace capstan::device {
namespace {

std::atomic<Accelerator*> installed = nullptr;

[[noreturn]] void refuse_graphs(const Accelerator& accelerator) {
  CAPSTAN_CHECK(false, "{} has no graphs", accelerator.name());
  std::abort();
}

}  // namespace

void Accelerator::begin_capture(Pool) { refuse_graphs(*this); }
Graph Accelerator::end_capture() { refuse_graphs(*this); }
void Accelerator::launch(Graph) { refuse_graphs(*this); }
void Accelerator::destroy(Graph) { refuse_graphs(*this); }
Pool Accelerator::create_pool() { refuse_graphs(*this); }
void Accelerator::destroy(Pool) { refuse_graphs(*this); }
void Accelerator::begin_allocating(Pool) { refuse_graphs(*this); }
void Accelerator::end_allocating(Pool) { refuse_graphs(*this); }

Accelerator* accelerator() { return installed.load(std::memory_order_acquire); }

void install_accelerator(Accelerator* accelerator) {
  Accelerator* none = nullptr;
  CAPSTAN_CHECK(installed.compare_exchange_strong(none, accelerator) || none == accelerator,
                "a second accelerator beside {}", none->name());
}

c10::Device run_device() {
  const Accelerator* const here = accelerator();
  return here ? here->device() : c10::Device(c10::DeviceType::CPU);
}

}  // namespace capstan::device
