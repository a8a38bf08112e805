// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/infer/kv_cache.h"

#include <ATen/ATen.h>

#include "capstan/base/check.h"

namespace capstan::infer {

std::pair<at::Tensor, at::Tensor> ContiguousKvCache::append(int layer, const at::Tensor& k_BTKH,
                                                            const at::Tensor& v_BTKH) {
  CAPSTAN_CHECK(layer >= 0 && layer < static_cast<int>(keys_.size()), "layer {} of {}", layer,
                keys_.size());
  const int64_t added = k_BTKH.size(1), total = length_ + added;
  CAPSTAN_CHECK(total <= capacity_, "{} tokens in a cache for {}", total, capacity_);
  at::Tensor& keys = keys_[static_cast<size_t>(layer)];
  at::Tensor& values = values_[static_cast<size_t>(layer)];
  if (!keys.defined()) {
    keys = at::empty({k_BTKH.size(0), capacity_, k_BTKH.size(2), k_BTKH.size(3)}, k_BTKH.options());
    values = at::empty_like(keys);
  }
  keys.narrow(1, length_, added).copy_(k_BTKH);
  values.narrow(1, length_, added).copy_(v_BTKH);
  if (layer + 1 == static_cast<int>(keys_.size())) length_ = total;
  return {keys.narrow(1, 0, total), values.narrow(1, 0, total)};
}

}  // namespace capstan::infer
