// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <span>

#include "capstan/optim/adamw.h"
#include "capstan/optim/device_step.h"

namespace capstan::optim {

// adamw_update by ATen with lr, scale, count and skip read on the device; of `constants` only
// betas, eps and weight decay count.
void adamw_by_numbers(std::span<const AdamWJob> jobs, const AdamWStep& constants,
                      const StepNumbers& numbers);

}  // namespace capstan::optim
