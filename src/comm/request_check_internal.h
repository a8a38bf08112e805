// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What a rank can check about its own call before any other rank is involved.
#pragma once
#include "capstan/comm/backend.h"

namespace capstan::comm {

// Throws InternalError naming operation, axis, got and need.
void check_request(const Request& request, const Group& group);

// Runs the operation of a group of one rank: at most a copy from in to out.
void run_alone(const Request& request);

}  // namespace capstan::comm
