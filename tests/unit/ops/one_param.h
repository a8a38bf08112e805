// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Stores with one or a few parameters for tests of single ops, and the backward of a sum.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include <string>

#include "support/gradient_check.h"
#include "support/plain_store.h"

namespace capstan::ops {

inline plan::ParamSpec param_spec(const std::string& name, plan::Shape shape, int fuse_group = -1) {
  plan::ParamSpec spec;
  spec.name = name;
  spec.shape = std::move(shape);
  spec.init = {plan::Init::Kind::kNormal, 0.5};
  spec.fuse_group = fuse_group;
  return spec;
}

// A leaf of autograd with its own memory.
inline at::Tensor leaf(const at::Tensor& x) { return x.detach().clone().requires_grad_(true); }

// Backward of sum(out * weights).
inline void run_backward(const at::Tensor& out, const at::Tensor& weights) {
  torch::autograd::backward({out}, {weights.to(out.scalar_type())});
}

inline double weighted_sum(const at::Tensor& a, const at::Tensor& b) {
  return (a.detach().to(at::kDouble) * b.to(at::kDouble)).sum().item<double>();
}

}  // namespace capstan::ops
