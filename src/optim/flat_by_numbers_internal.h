// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <span>

#include "capstan/optim/device_step.h"
#include "capstan/optim/flat_update.h"

namespace capstan::optim {

// update_flat by ATen with lr, scale, count and skip read on the device; of `constants` only betas,
// eps and weight decay count. Moments have the type of the weights.
void flat_by_numbers(UpdateRule rule, std::span<const FlatJob> jobs, const FlatStep& constants,
                     const StepNumbers& numbers);

}  // namespace capstan::optim
