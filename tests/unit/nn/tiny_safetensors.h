// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Reads a small trusted safetensors file of fp64, fp32 and int64 tensors.
#pragma once
#include <ATen/core/Tensor.h>

#include <map>
#include <string>

namespace capstan::nn {

struct TinySafetensors {
  std::map<std::string, at::Tensor> tensors;
  std::map<std::string, std::string> metadata;
};
[[nodiscard]] TinySafetensors read_tiny_safetensors(const std::string& path);

}  // namespace capstan::nn
