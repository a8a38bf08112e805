// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Legend: N tokens, D hidden features, E experts, k choices of a token, S rows.
#include "capstan/ops/router.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "capstan/base/check.h"
#include "capstan/ops/linear.h"
#include "capstan/ops/path.h"
#include "ops/experts_on_device_internal.h"
#include "ops/router_internal.h"

namespace capstan::ops {
namespace {

// Keeps a sum of sigmoids that all underflow away from 0.
constexpr double kTiny = 1e-20;

at::ScalarType wide_dtype(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

Tensor scores_of(const Tensor& logits_NE, bool sigmoid) {
  return sigmoid ? at::sigmoid(logits_NE) : at::softmax(logits_NE, -1);
}

// Scores scaled to sum 1 per token; softmax is that already.
struct Shares {
  Tensor shares_NE, total_N1;
};
Shares shares_of(const Tensor& scores_NE, bool sigmoid) {
  if (!sigmoid) return {scores_NE, {}};
  const Tensor total_N1 = scores_NE.sum(-1, true).add_(kTiny);
  return {scores_NE / total_N1, total_N1};
}

// Gradient of the scores by that of the weights: w = scaling s, or scaling s / sum of chosen s.
Tensor chosen_gradient(const Tensor& grad_Nk, const Tensor& chosen_Nk, const RouterSpec& spec) {
  if (!spec.normalize) return grad_Nk * spec.scaling;
  const Tensor total_N1 = chosen_Nk.sum(-1, true).add_(kTiny);
  const Tensor mean_N1 = (grad_Nk * chosen_Nk).sum(-1, true) / total_N1;
  return (grad_Nk - mean_N1) * (spec.scaling / total_N1);
}

void add_balance_gradient(Tensor& grad_NE, const Tensor& scores_NE, const RouterSpec& spec,
                          const RouterLoss& loss) {
  if (!loss.balance_SE.defined()) return;
  const Tensor balance_NE = loss.balance_SE.to(grad_NE.scalar_type()).index_select(0, loss.row_N);
  if (!spec.sigmoid) {
    grad_NE.add_(balance_NE);
    return;
  }
  const Shares s = shares_of(scores_NE, true);
  const Tensor mean_N1 = (balance_NE * s.shares_NE).sum(-1, true);
  grad_NE.add_((balance_NE - mean_N1) / s.total_N1);
}

bool has_kernel(const Tensor& logits_NE, const RouterSpec& spec) {
  return path_of(logits_NE) == Path::kDevice && on_device::takes_router(spec, logits_NE.size(1));
}

Tensor logit_gradient(const Tensor& grad_Nk, const Tensor& logits_NE, const Tensor& experts_Nk,
                      const RouterSpec& spec, const RouterLoss& loss) {
  if (has_kernel(logits_NE, spec))
    return on_device::logit_gradient(grad_Nk, logits_NE, experts_Nk, spec, loss);
  const Tensor scores_NE = scores_of(logits_NE, spec.sigmoid);
  Tensor grad_NE = at::zeros_like(scores_NE);
  grad_NE.scatter_(1, experts_Nk, chosen_gradient(grad_Nk, scores_NE.gather(1, experts_Nk), spec));
  add_balance_gradient(grad_NE, scores_NE, spec, loss);
  if (spec.sigmoid)
    grad_NE.mul_(scores_NE * (1 - scores_NE));
  else
    grad_NE.sub_((grad_NE * scores_NE).sum(-1, true)).mul_(scores_NE);
  if (loss.z != 0) {
    const Tensor lse_N1 = at::logsumexp(logits_NE, {-1}, true);
    const Tensor soft_NE = spec.sigmoid ? at::softmax(logits_NE, -1) : scores_NE;
    grad_NE.add_(soft_NE * lse_N1, 2 * loss.z);
  }
  return grad_NE;
}

}  // namespace

Routing route(const Tensor& x_ND, const Tensor& weight_ED, const Tensor& bias_E,
              const RouterSpec& spec) {
  CAPSTAN_CHECK(x_ND.dim() == 2 && x_ND.size(1) == weight_ED.size(1),
                "router: {} features for weights of {}", x_ND.size(-1), weight_ED.size(1));
  at::NoGradGuard no_grad;
  const auto wide = wide_dtype(x_ND);
  Routing r;
  r.logits_NE = linear_forward(x_ND.to(wide), weight_ED.to(wide), {});
  check_router(spec, r.logits_NE.size(1));
  if (has_kernel(r.logits_NE, spec)) {
    on_device::fill_routing(r, bias_E, spec);
    return r;
  }
  r.scores_NE = scores_of(r.logits_NE, spec.sigmoid);
  r.experts_Nk = choose_experts(r.scores_NE, bias_E, spec);
  Tensor weights_Nk = r.scores_NE.gather(1, r.experts_Nk);
  if (spec.normalize) weights_Nk.div_(weights_Nk.sum(-1, true).add_(kTiny));
  r.weights_Nk = weights_Nk.mul_(spec.scaling);
  return r;
}

RouterLossValues router_loss_values(const Routing& routing, const RouterSpec& spec,
                                    const RouterLoss& loss) {
  at::NoGradGuard no_grad;
  const auto wide = routing.scores_NE.options().dtype(at::kDouble);
  RouterLossValues values{at::zeros({}, wide), at::zeros({}, wide)};
  if (loss.balance_SE.defined()) {
    const Tensor shares = shares_of(routing.scores_NE, spec.sigmoid).shares_NE.to(at::kDouble);
    values.balance = (loss.balance_SE.to(at::kDouble).index_select(0, loss.row_N) * shares).sum();
  }
  if (loss.z != 0)
    values.z = at::logsumexp(routing.logits_NE.to(at::kDouble), {-1}).square().sum() * loss.z;
  return values;
}

Tensor router_weights(const Tensor& x_ND, const Projection& router, const Routing& routing,
                      const RouterSpec& spec, const RouterLoss& loss) {
  CAPSTAN_CHECK(router.bias.empty(), "router: its bias is no parameter");
  const bool wants_input_gradient = x_ND.requires_grad();
  // A fresh alias: what was routed stays without history.
  const Tensor weights_Nk = routing.weights_Nk.detach();
  return record(
      weights_Nk,
      {"router",
       {x_ND},
       router.parts,
       {router.trainable() ? x_ND : Tensor(), routing.logits_NE, routing.experts_Nk},
       [router, spec, loss, wants_input_gradient, input_dtype = x_ND.scalar_type()](
           const Tensors& saved, Tensors& grads) -> Tensors {
         at::NoGradGuard no_grad;
         const Tensor dlogits_NE = logit_gradient(grads[0], saved[1], saved[2], spec, loss);
         if (router.trainable()) {
           const Tensor x = saved[0].detach();
           router.accumulate([dlogits_NE, x](param::GradSlot& slot) {
             add_outer_product(slot, dlogits_NE, x.to(dlogits_NE.scalar_type()));
           });
         }
         if (!wants_input_gradient) return {Tensor()};
         return {linear_input_gradient(dlogits_NE, router.weight().to(dlogits_NE.scalar_type()))
                     .to(input_dtype)};
       }});
}

}  // namespace capstan::ops
