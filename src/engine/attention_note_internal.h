// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What attention will be on a device.
#pragma once
#include <ATen/core/Tensor.h>

#include "capstan/ops/attention_choice.h"
#include "capstan/plan/plan.h"

namespace capstan::engine {

// What the attention of a training pass asks for; with a ring, its least simple blocks.
[[nodiscard]] ops::AttentionCase attention_case(const plan::Plan& plan, at::Device device);
// Whether attention on the device reads the starts of documents.
[[nodiscard]] bool uses_document_starts(const plan::Plan& plan, at::Device device);
// One line, a warning where 16-bit attention has to take the reference.
void log_attention(const plan::Plan& plan, at::Device device);

}  // namespace capstan::engine
