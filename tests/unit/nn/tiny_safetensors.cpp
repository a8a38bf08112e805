// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "unit/nn/tiny_safetensors.h"

#include <ATen/ATen.h>

#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "capstan/base/check.h"

namespace capstan::nn {
namespace {

at::ScalarType dtype_of(const std::string& name) {
  if (name == "F64") return at::kDouble;
  if (name == "F32") return at::kFloat;
  CAPSTAN_CHECK(name == "I64", "dtype {} in a fixture", name);
  return at::kLong;
}

}  // namespace

TinySafetensors read_tiny_safetensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  CAPSTAN_CHECK(file, "cannot open {}", path);
  std::stringstream stream;
  stream << file.rdbuf();
  const std::string bytes = stream.str();
  uint64_t header_size = 0;
  CAPSTAN_CHECK(bytes.size() > 8, "{} is too short", path);
  std::memcpy(&header_size, bytes.data(), 8);
  const auto header = nlohmann::json::parse(bytes.substr(8, header_size));
  TinySafetensors result;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") {
      result.metadata = entry.get<std::map<std::string, std::string>>();
      continue;
    }
    const auto sizes = entry.at("shape").get<std::vector<int64_t>>();
    const auto offsets = entry.at("data_offsets").get<std::vector<size_t>>();
    at::Tensor tensor = at::empty(sizes, dtype_of(entry.at("dtype").get<std::string>()));
    CAPSTAN_CHECK(tensor.nbytes() == offsets[1] - offsets[0], "size of {}", name);
    std::memcpy(tensor.data_ptr(), bytes.data() + 8 + header_size + offsets[0], tensor.nbytes());
    result.tensors[name] = tensor;
  }
  return result;
}

}  // namespace capstan::nn
