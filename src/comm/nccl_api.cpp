// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/comm/nccl_api.h"

#include <mutex>
#include <utility>

#include "capstan/comm/nccl.h"

namespace capstan::comm {
namespace {

std::mutex install_mutex;
std::shared_ptr<NcclApi>& installed() {
  static std::shared_ptr<NcclApi> api;
  return api;
}

std::optional<NcclType> arithmetic_type_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return NcclType::kFloat64;
    case at::kFloat:
      return NcclType::kFloat32;
    case at::kBFloat16:
      return NcclType::kBfloat16;
    case at::kHalf:
      return NcclType::kFloat16;
    case at::kLong:
      return NcclType::kInt64;
    case at::kInt:
      return NcclType::kInt32;
    case at::kChar:
      return NcclType::kInt8;
    case at::kByte:
    case at::kBool:
      return NcclType::kUint8;
    default:
      return std::nullopt;
  }
}

}  // namespace

std::shared_ptr<NcclApi> installed_nccl_api() {
  const std::scoped_lock lock(install_mutex);
  return installed();
}

void install_nccl_api(std::shared_ptr<NcclApi> api) {
  const std::scoped_lock lock(install_mutex);
  installed() = std::move(api);
}

std::optional<NcclReduction> nccl_reduction_of(at::ScalarType type, ReduceOp op) {
  const auto element = arithmetic_type_of(type);
  if (!element) return std::nullopt;
  const bool is_bool = type == at::kBool;
  switch (op) {
    case ReduceOp::kSum:
      if (is_bool) return std::nullopt;
      return NcclReduction{*element, NcclReduce::kSum};
    case ReduceOp::kMax:
      return NcclReduction{*element, NcclReduce::kMax};
    case ReduceOp::kMin:
      return NcclReduction{*element, NcclReduce::kMin};
    case ReduceOp::kOr:
      if (!is_bool) return std::nullopt;
      return NcclReduction{*element, NcclReduce::kMax};
  }
  return std::nullopt;
}

}  // namespace capstan::comm
