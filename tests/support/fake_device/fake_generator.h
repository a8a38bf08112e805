// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Random numbers of the fake device: a CPU generator under the device's name.
#pragma once
#include <ATen/core/Generator.h>

namespace capstan::test::fake {

at::Generator make_generator();
const at::Generator& default_generator();
// The CPU generator inside. Throws for a generator of another device, as CUDA does.
at::Generator host_generator(const at::Generator& generator);

}  // namespace capstan::test::fake
