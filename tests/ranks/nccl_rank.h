// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Ranks with a fake accelerator and a fake NCCL each, as threads of this process.
#pragma once
#include <functional>
#include <memory>

#include "capstan/comm/communicator.h"
#include "ranks/comm_backends.h"
#include "support/fake_accelerator.h"
#include "support/fake_nccl.h"

namespace capstan::test {

struct NcclRank {
  std::shared_ptr<FakeAccelerator> device;
  comm::Communicator world;  // requests on tensors of `device` go to NCCL

  [[nodiscard]] at::Tensor on_device(const at::Tensor& cpu) const { return device->on_device(cpu); }
  // Work on the current stream that reads or writes memory.
  void compute(std::function<void()> job) const {
    device->run(device->current_stream(), std::move(job));
  }
  void synchronize() const { device->synchronize(device->current_stream()); }
};

struct NcclRankOptions {
  std::shared_ptr<FakeFabric> fabric = std::make_shared<FakeFabric>();
  Kind control = Kind::kThreads;
  double timeout_s = 60;
};

// As run_on. Afterwards every NCCL communicator is closed and none was misused.
void run_nccl_ranks(int n, const std::function<void(const NcclRank& rank)>& fn,
                    const NcclRankOptions& options = {});

// The same group for callers whose tensors are on the CPU: they pass through NCCL as tensors of the
// device, apart from those on the axis "control", and wait() waits for the device.
[[nodiscard]] comm::Communicator for_cpu_tensors(const NcclRank& rank);

}  // namespace capstan::test
