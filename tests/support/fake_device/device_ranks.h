// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Ranks as threads whose tensors live on the fake device and travel by NCCL: the engine's device
// path with real streams for communication. A stream of a communicator is a thread, so what does
// not wait for it reads too early.
#pragma once
#include <functional>
#include <memory>

#include "capstan/comm/communicator.h"
#include "support/fake_nccl.h"

namespace capstan::test {

// As run_ranks; installs the fake device. Backward runs on the threads of the ranks. `fabric` for
// faults; null: one of its own.
void run_device_ranks(int n, const std::function<void(comm::Communicator world)>& fn,
                      double deadline_s = 75, std::shared_ptr<FakeFabric> fabric = nullptr);

}  // namespace capstan::test
