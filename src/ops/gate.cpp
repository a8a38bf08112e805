// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/gate.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "capstan/base/check.h"

namespace capstan::ops {

Tensor gated(const Tensor& y, const Tensor& logit) {
  CAPSTAN_CHECK(logit.size(-1) == 1 && logit.numel() * y.size(-1) == y.numel(),
                "gated: {} logits for {} features in rows of {}", logit.numel(), y.numel(),
                y.size(-1));
  Tensor out;
  {
    at::NoGradGuard no_grad;
    out = y * at::sigmoid(logit);
  }
  return record(
      out,
      {"gated", {y, logit}, {}, {y, logit}, [](const Tensors& saved, Tensors& grads) -> Tensors {
         at::NoGradGuard no_grad;
         const Tensor share = at::sigmoid(saved[1]);
         const Tensor slope = (grads[0] * saved[0]).sum(-1, true);
         return {grads[0] * share, slope * share * (1 - share)};
       }});
}

}  // namespace capstan::ops
