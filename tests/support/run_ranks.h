// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Ranks as threads, for tests.
#pragma once
#include <functional>

#include "capstan/comm/communicator.h"

namespace capstan::test {

// Runs fn(world) on n rank threads with one compute thread each. The first failure is thrown as
// comm::RankError. A rank that is not through after `deadline_s` ends the test program with a
// report of what each late rank did last: a thread that hangs outside of comm cannot be ended in
// any other way.
void run_ranks(int n, const std::function<void(comm::Communicator world)>& fn,
               double deadline_s = 75);

}  // namespace capstan::test
