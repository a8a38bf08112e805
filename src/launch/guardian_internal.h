// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <sys/types.h>

#include "capstan/base/descriptor.h"

namespace capstan::launch::internal {

// A small process that outlives the launcher by a moment: when the launcher is gone, however it
// ended, it kills the process groups of the ranks. The ranks themselves die by their parent-death
// signal; this reaches their children.
class Guardian {
 public:
  Guardian();
  ~Guardian();
  Guardian(const Guardian&) = delete;
  Guardian& operator=(const Guardian&) = delete;
  void watch(pid_t group);
  void forget(pid_t group);  // before the leader is reaped: afterwards the number may be reused

 private:
  void tell(pid_t number);
  pid_t process_ = -1;
  capstan::Descriptor pipe_;
};

}  // namespace capstan::launch::internal
