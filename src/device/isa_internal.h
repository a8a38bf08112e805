// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The decision behind isa_level(), without the environment.
#pragma once
#include <optional>
#include <string>

#include "capstan/device/isa.h"

namespace capstan::device {

[[nodiscard]] Isa choose_isa(Isa detected, const std::optional<std::string>& asked);

}  // namespace capstan::device
