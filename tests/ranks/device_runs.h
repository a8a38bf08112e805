// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Runs of the tiny model on the fake device, which they install; several ranks talk by NCCL.
#pragma once
#include "ranks/engine_fixture.h"

namespace capstan::engine::testing {

struct DeviceOutcome {
  std::vector<StepReport> reports;  // of rank 0
  std::string hash;
  int64_t waits = 0;  // of the host, from the third step on
  int64_t peak = 0;   // bytes on the device above what was there before
};
[[nodiscard]] DeviceOutcome run_on_device(const TinyRun& run);
void expect_same_bits(const DeviceOutcome& got, const DeviceOutcome& want);

}  // namespace capstan::engine::testing
