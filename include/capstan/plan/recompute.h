// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "capstan/recipe/recipe.h"

namespace capstan::plan {

// Selective recompute: what the parts of a layer save is made again in the backward, from the input
// of the part (Korthikanti et al. 2022, section 5; here for more than attention).
struct RemadeParts {
  bool attention = false;  // projections to query, key, value; attention
  bool mlp = false;        // up to the projection back to the residual stream; all of the experts
  bool norm = false;       // outputs of both norms, from the residual stream
};
[[nodiscard]] RemadeParts remade_parts(const recipe::Recompute& recompute);

}  // namespace capstan::plan
