// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/plan/recompute.h"

#include <algorithm>
#include <string_view>

namespace capstan::plan {

RemadeParts remade_parts(const recipe::Recompute& recompute) {
  const auto has = [&](std::string_view part) {
    return recompute.mode == "selective" &&
           std::find(recompute.parts.begin(), recompute.parts.end(), part) != recompute.parts.end();
  };
  return {.attention = has("attention"), .mlp = has("mlp"), .norm = has("norm")};
}

}  // namespace capstan::plan
