// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "support/fake_device/device_ranks.h"

#include <memory>
#include <mutex>
#include <vector>

#include "capstan/comm/nccl.h"
#include "support/fake_device/capture.h"
#include "support/fake_device/fake_device.h"
#include "support/fake_device/queued_streams.h"
#include "support/run_ranks.h"

namespace capstan::test {
namespace {

std::shared_ptr<FakeNccl> make_nccl(const std::shared_ptr<FakeFabric>& fabric, int rank,
                                    const std::shared_ptr<QueuedStreams>& streams) {
  FakeNccl::Options options;
  options.queue = [streams](device::Stream stream, std::function<void()> job) {
    streams->run(stream, std::move(job));
  };
  options.host_address = [](void* p) { return p ? host_of(p) : p; };
  options.record = fake::run_in_capture;
  return std::make_shared<FakeNccl>(fabric, rank, std::move(options));
}

}  // namespace

void run_device_ranks(int n, const std::function<void(comm::Communicator)>& fn, double deadline_s,
                      std::shared_ptr<FakeFabric> fabric) {
  device::Accelerator& device = install_fake_device();
  if (!fabric) fabric = std::make_shared<FakeFabric>();
  std::mutex mutex;
  std::vector<std::shared_ptr<QueuedStreams>> all;  // outlive every communicator
  const auto on_rank = [&](const comm::Communicator& control) {
    const BackwardOnThisThread here;
    const auto streams = std::make_shared<QueuedStreams>(device);
    {
      const std::lock_guard lock(mutex);
      all.push_back(streams);
    }
    const auto world =
        comm::make_nccl_communicator(control, make_nccl(fabric, control.rank(), streams), *streams);
    try {
      fn(world);
    } catch (const std::exception& error) {
      world.abort(error.what());
      throw;
    }
    world.barrier().wait();
  };
  try {
    run_ranks(n, on_rank, deadline_s);
  } catch (...) {
    fabric->shut_down();
    throw;
  }
  fabric->shut_down();
}

}  // namespace capstan::test
