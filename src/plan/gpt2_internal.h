// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The gpt2 family: LayerNorm, learned positions, biases on every projection, GELU.
#pragma once
#include "capstan/base/json.h"
#include "capstan/plan/family.h"

namespace capstan::plan {

[[nodiscard]] FamilyDef gpt2_family();

// config.json as GPT-2 spells it.
[[nodiscard]] std::string to_gpt2_config(const ModelShape& shape, const std::string& dtype);
// The same settings under the names that other models share; keys that are none of a GPT-2's stay.
// Null and missing keys are alike.
[[nodiscard]] json::Json from_gpt2_keys(const json::Json& config);

}  // namespace capstan::plan
