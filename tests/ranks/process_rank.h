// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// This process as one rank of the conformance suite.
#pragma once
#include "capstan/comm/communicator.h"

namespace capstan::test {

// The world of this process, met at the first call and left when all tests have run. Its requests
// take CPU tensors, which pass as copies on the run's device, apart from those on the axis
// "control", and wait() waits for the device. All ranks run the same tests.
[[nodiscard]] comm::Communicator process_world();

}  // namespace capstan::test
