// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/optim/loss_scale.h"

#include <algorithm>

namespace capstan::optim {

void LossScale::update(bool is_finite) {
  if (!options_.dynamic) return;
  if (!is_finite) {
    value_ = std::max(options_.smallest, value_ * options_.backoff);
    good_steps_ = 0;
    return;
  }
  if (++good_steps_ < options_.interval) return;
  value_ = std::min(options_.largest, value_ * options_.growth);
  good_steps_ = 0;
}

void LossScale::restore(double value, int64_t good_steps) {
  if (!options_.dynamic || value <= 0) return;  // a fixed scale is the recipe's
  value_ = value;
  good_steps_ = good_steps;
}

}  // namespace capstan::optim
