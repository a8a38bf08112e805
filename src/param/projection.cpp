// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <ATen/ATen.h>

#include "capstan/base/check.h"
#include "capstan/param/param.h"

namespace capstan::param {
namespace {

std::vector<int> indices_of(const std::vector<Param>& parts) {
  std::vector<int> indices;
  indices.reserve(parts.size());
  for (const Param& part : parts) {
    CAPSTAN_CHECK(part.store() == parts.front().store(), "projection part {} is of another block",
                  part.spec().name);
    CAPSTAN_CHECK(part.trainable() == parts.front().trainable(),
                  "projection parts {} and {} differ in being trainable", part.spec().name,
                  parts.front().spec().name);
    indices.push_back(part.index());
  }
  return indices;
}

Tensor joined_value(const std::vector<Param>& parts) {
  if (parts.size() == 1) return parts.front().value();
  return parts.front().store()->joined_value(indices_of(parts));
}

void accumulate_joined(const std::vector<Param>& parts, const AddGradient& add, When when) {
  if (parts.empty() || !parts.front().trainable()) return;
  if (parts.size() == 1) return parts.front().accumulate(add, when);
  parts.front().store()->accumulate_joined(indices_of(parts), add, when);
}

}  // namespace

Tensor Projection::weight() const {
  CAPSTAN_CHECK(!parts.empty(), "projection without weights");
  return joined_value(parts);
}

Tensor Projection::bias_value() const { return bias.empty() ? Tensor() : joined_value(bias); }

bool Projection::trainable() const {
  CAPSTAN_CHECK(!parts.empty(), "projection without weights");
  return parts.front().trainable();
}

void Projection::accumulate(const AddGradient& add, When when) const {
  accumulate_joined(parts, add, when);
}

void Projection::accumulate_bias(const AddGradient& add, When when) const {
  accumulate_joined(bias, add, when);
}

}  // namespace capstan::param
