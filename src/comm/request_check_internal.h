// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What a rank can check about its own call before any other rank is involved.
#pragma once
#include "capstan/comm/backend.h"

namespace capstan::comm {

// Throws InternalError naming operation, axis, got and need. Tensors are on the CPU or on `device`.
void check_request(const Request& request, const Group& group, c10::Device device);

// Runs the operation of a group of one rank: at most a copy from in to out, queued on the current
// stream where they are on a device.
void run_alone(const Request& request);

}  // namespace capstan::comm
