// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Models against numbers recorded from Hugging Face (tests/fixtures/nn).
#pragma once
#include <functional>
#include <string>

#include "capstan/plan/shape.h"
#include "support/gradient_check.h"
#include "unit/nn/tiny_safetensors.h"

namespace capstan::nn {

// A recorded weight ("weight.") or gradient ("gradient.") by the name and in the shape that the
// model's table has it.
using ReadRecorded = std::function<at::Tensor(const std::string& what, const std::string& name)>;

// Logits, loss and every gradient of the model are those of the fixture.
void expect_recorded(const TinySafetensors& fixture, const plan::ModelShape& shape,
                     at::ScalarType dtype, const testing::Tolerance& tolerance,
                     const ReadRecorded& read);

}  // namespace capstan::nn
