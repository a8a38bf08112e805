// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Initial values where the parameter lies.
#pragma once
#include "capstan/param/init.h"

namespace capstan::ops {

// out, contiguous, any shape with as many elements as the box, becomes param::init_values of the
// box in its dtype. On a device a kernel draws normal values; boxes whose rows are not equally far
// apart, and devices without our kernels, get them from the host.
void fill_init_values(const at::Tensor& out, const plan::ParamSpec& spec, const plan::Box& box,
                      uint64_t seed, const std::string& model_name);

}  // namespace capstan::ops
