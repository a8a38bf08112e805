// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>

#include "capstan/base/descriptor.h"

namespace capstan::launch::internal {

struct Listener {
  capstan::Descriptor socket;  // listening, close-on-exec
  int port = 0;
};
// Binds a free port of a numeric address; throws ConfigError for an address that is none, EnvError
// otherwise.
[[nodiscard]] Listener listen_on_free_port(const std::string& address);

}  // namespace capstan::launch::internal
