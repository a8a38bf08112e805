// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <utility>

#include "capstan/nn/model.h"
#include "capstan/ops/keep.h"

namespace capstan::nn {

Tensor run_part(bool again, const Context& context, const Tensor& x, LayerPart part) {
  if (!again) return part(context, x);
  return ops::remake(x, [context, part = std::move(part)](const Tensor& input, bool repeats) {
    if (!repeats) return part(context, input);
    Context second = context;
    second.mode = param::Mode::kRecompute;
    second.stats = nullptr;
    return part(second, input);
  });
}

}  // namespace capstan::nn
