// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Keys and values of all layers in buffers of fixed capacity, filled from the left.
#pragma once
#include <ATen/core/Tensor.h>

#include <utility>
#include <vector>

#include "capstan/param/context.h"

namespace capstan::infer {

class ContiguousKvCache final : public param::KvCache {
 public:
  ContiguousKvCache(int64_t layers, int64_t capacity_tokens)
      : keys_(layers), values_(layers), capacity_(capacity_tokens) {}
  // The first append of a layer fixes batch, heads, size and dtype. Throws InternalError beyond the
  // capacity.
  std::pair<at::Tensor, at::Tensor> append(int layer, const at::Tensor& k_BTKH,
                                           const at::Tensor& v_BTKH) override;
  // Tokens of finished passes: the last layer's append ends a pass.
  [[nodiscard]] int64_t length() const override { return length_; }
  [[nodiscard]] int64_t capacity() const { return capacity_; }

 private:
  std::vector<at::Tensor> keys_, values_;
  int64_t capacity_, length_ = 0;
};

}  // namespace capstan::infer
