// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <gmock/gmock.h>

#include <functional>
#include <memory>
#include <string>

#include "capstan/comm/threads.h"
#include "capstan/device/accelerator.h"
#include "support/fake_device/device_ranks.h"

namespace capstan::test {

// As on devices of their own, ranks do not share a stream.
inline void run_ranks_on_streams(int n, const std::function<void(const comm::Communicator&)>& fn,
                                 std::shared_ptr<FakeFabric> fabric = nullptr) {
  if (!fabric) fabric = std::make_shared<FakeFabric>();
  const auto on_own_stream = [&](const comm::Communicator& world) {
    device::Accelerator& accelerator = *device::accelerator();
    const device::StreamGuard guard(accelerator, accelerator.create_stream(false));
    fn(world);
  };
  run_device_ranks(n, on_own_stream, 75, fabric);
  EXPECT_THAT(fabric->misuses(), ::testing::IsEmpty());
}

inline std::string failure_of(const std::function<void()>& fn) {
  try {
    fn();
  } catch (const comm::RankError& e) {
    return e.what();
  }
  return "no failure";
}

}  // namespace capstan::test
