// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Values for tests of updates.
#pragma once
#include <ATen/ATen.h>

namespace capstan::optim {

inline at::Tensor wave(int64_t count, double phase, at::ScalarType type = at::kDouble) {
  return at::arange(count, at::kDouble).mul(0.37).add(phase).sin().to(type);
}

inline double difference(const at::Tensor& a, const at::Tensor& b) {
  return a.to(at::kDouble).sub(b.to(at::kDouble)).abs().max().item<double>();
}

}  // namespace capstan::optim
