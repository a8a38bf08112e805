// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Keys and values of all tokens so far, by layer, as a model asks for them when it decodes.
#pragma once
#include <ATen/ATen.h>

#include <map>
#include <utility>

#include "capstan/param/context.h"

namespace capstan::test {

class GrowingCache final : public param::KvCache {
 public:
  std::pair<at::Tensor, at::Tensor> append(int layer, const at::Tensor& k_BTKH,
                                           const at::Tensor& v_BTKH) override {
    auto& [keys, values] = layers_[layer];
    keys = keys.defined() ? at::cat({keys, k_BTKH}, 1) : k_BTKH.clone();
    values = values.defined() ? at::cat({values, v_BTKH}, 1) : v_BTKH.clone();
    return {keys, values};
  }
  [[nodiscard]] int64_t length() const override {
    return layers_.empty() ? 0 : layers_.begin()->second.first.size(1);
  }

 private:
  std::map<int, std::pair<at::Tensor, at::Tensor>> layers_;
};

}  // namespace capstan::test
