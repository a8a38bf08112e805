// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The declarations that ProcessGroupGloo.hpp needs: LibTorch exports gloo but ships none of its
// headers.
#pragma once
#include <chrono>
#include <memory>

#include "gloo/transport/device.h"

namespace gloo {

class Context {
 public:
  void setTimeout(std::chrono::milliseconds timeout);
  void closeConnections();  // fails every operation under way, here and at the peers
};

}  // namespace gloo
