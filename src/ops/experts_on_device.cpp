// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "ops/experts_on_device_internal.h"

#include <ATen/ATen.h>

#include <limits>

#include "ops/on_device_internal.h"

namespace capstan::ops::on_device {
namespace {

constexpr int64_t kRouterExperts = 512, kRouterChoices = 32, kRouterGroups = 32;
constexpr int64_t kOrderExperts = 1024;

const void* pointer(const Tensor& x) { return x.defined() ? x.const_data_ptr() : nullptr; }

kernels::RouterShape shape_of(const Tensor& logits_NE, const RouterSpec& spec) {
  return {.dtype = *dtype_of(logits_NE),
          .tokens = logits_NE.size(0),
          .experts = logits_NE.size(1),
          .per_token = spec.per_token,
          .sigmoid = spec.sigmoid,
          .normalize = spec.normalize,
          .groups = spec.groups,
          .groups_per_token = spec.groups_per_token,
          .scaling = spec.scaling};
}

kernels::PermuteShape shape_of(const Tensor& rows_RD, const Tensor& place_Nk) {
  return {.dtype = *dtype_of(rows_RD),
          .tokens = place_Nk.size(0),
          .per_token = place_Nk.size(1),
          .width = rows_RD.size(1),
          .place = place_Nk.const_data_ptr<int64_t>()};
}

std::vector<int64_t> on_host(const Tensor& counts_E) {
  device::Accelerator& accelerator = *device::accelerator();
  const Tensor pinned = accelerator.empty_pinned(counts_E.sizes(), at::kLong);
  pinned.copy_(counts_E, /*non_blocking=*/true);
  accelerator.synchronize(accelerator.current_stream());
  const auto* const begin = pinned.const_data_ptr<int64_t>();
  return {begin, begin + pinned.numel()};
}

}  // namespace

bool takes_router(const RouterSpec& spec, int64_t experts) {
  return experts <= kRouterExperts && spec.per_token <= kRouterChoices &&
         spec.groups <= kRouterGroups;
}

bool takes_order(int64_t slots, int64_t experts) {
  return experts <= kOrderExperts && slots < std::numeric_limits<int32_t>::max();
}

void fill_routing(Routing& routing, const Tensor& bias_E, const RouterSpec& spec) {
  const Tensor& logits_NE = routing.logits_NE;
  const int64_t tokens = logits_NE.size(0);
  routing.scores_NE = at::empty_like(logits_NE);
  routing.experts_Nk = at::empty({tokens, spec.per_token}, logits_NE.options().dtype(at::kLong));
  routing.weights_Nk = at::empty({tokens, spec.per_token}, logits_NE.options());
  const Tensor bias = bias_E.defined() ? bias_E.to(logits_NE.options()).contiguous() : bias_E;
  if (tokens == 0) return;
  device_kernels()->router_forward({.shape = shape_of(logits_NE, spec),
                                    .logits = logits_NE.const_data_ptr(),
                                    .bias = pointer(bias),
                                    .scores = routing.scores_NE.mutable_data_ptr(),
                                    .chosen = routing.experts_Nk.mutable_data_ptr<int64_t>(),
                                    .weights = routing.weights_Nk.mutable_data_ptr()},
                                   stream());
}

Tensor logit_gradient(const Tensor& grad_in, const Tensor& logits_NE, const Tensor& experts_in,
                      const RouterSpec& spec, const RouterLoss& loss) {
  const Tensor grad_NE = at::empty_like(logits_NE);
  if (logits_NE.size(0) == 0) return grad_NE;
  const bool balances = loss.balance_SE.defined();
  const Tensor grad_Nk = grad_in.contiguous(), experts_Nk = experts_in.contiguous();
  const Tensor balance_SE =
      balances ? loss.balance_SE.to(logits_NE.scalar_type()).contiguous() : Tensor();
  const Tensor row_N = balances ? loss.row_N.contiguous() : Tensor();
  device_kernels()->router_backward({.shape = shape_of(logits_NE, spec),
                                     .logits = logits_NE.const_data_ptr(),
                                     .chosen = experts_Nk.const_data_ptr<int64_t>(),
                                     .grad_weights = grad_Nk.const_data_ptr(),
                                     .balance = pointer(balance_SE),
                                     .row = static_cast<const int64_t*>(pointer(row_N)),
                                     .z = loss.z,
                                     .grad_logits = grad_NE.mutable_data_ptr()},
                                    stream());
  return grad_NE;
}

ExpertOrder order_by_expert(const Tensor& experts_in, const Tensor& keep_in, int64_t experts,
                            bool keeps_counts) {
  const Tensor experts_Nk = experts_in.contiguous();
  const Tensor keep_Nk = keep_in.defined() ? keep_in.contiguous() : keep_in;
  const int64_t slots = experts_Nk.numel();
  const auto& longs = experts_Nk.options();
  const auto bytes =
      static_cast<int64_t>(device_kernels()->expert_order_workspace_bytes(slots, experts));
  const Tensor workspace = at::empty({bytes}, longs.dtype(at::kByte));
  const Tensor counts_E = at::empty({experts}, longs), slot = at::empty({slots}, longs);
  ExpertOrder order{
      .slot_R = slot, .place_Nk = at::empty_like(experts_Nk), .counts_E = {}, .ends_E = {}};
  device_kernels()->expert_order({.slots = slots,
                                  .experts = experts,
                                  .chosen = experts_Nk.const_data_ptr<int64_t>(),
                                  .keep = static_cast<const uint8_t*>(pointer(keep_Nk)),
                                  .place = order.place_Nk.mutable_data_ptr<int64_t>(),
                                  .slot = slot.mutable_data_ptr<int64_t>(),
                                  .counts = counts_E.mutable_data_ptr<int64_t>(),
                                  .workspace = static_cast<int*>(workspace.mutable_data_ptr())},
                                 stream());
  if (keeps_counts) {
    order.ends_E = counts_E.cumsum(0, at::kInt);
    return order;
  }
  order.counts_E = on_host(counts_E);
  int64_t rows = 0;
  for (const int64_t count : order.counts_E) rows += count;
  order.slot_R = slot.narrow(0, 0, rows);
  return order;
}

Tensor permute_tokens(const Tensor& x_in, const ExpertOrder& order) {
  const Tensor x_ND = x_in.contiguous();
  const Tensor rows_RD = order.padded_rows > 0
                             ? at::zeros({order.padded_rows, x_ND.size(1)}, x_ND.options())
                             : at::empty({order.slot_R.numel(), x_ND.size(1)}, x_ND.options());
  if (rows_RD.numel() == 0) return rows_RD;
  device_kernels()->permute_tokens({.shape = shape_of(x_ND, order.place_Nk),
                                    .x = x_ND.const_data_ptr(),
                                    .rows = rows_RD.mutable_data_ptr()},
                                   stream());
  return rows_RD;
}

Tensor sum_of_rows(const Tensor& rows_in, const Tensor& weights_in, const Tensor& place_Nk) {
  const Tensor rows_RD = rows_in.contiguous();
  const Tensor weights_Nk = weights_in.defined() ? weights_in.contiguous() : weights_in;
  const std::vector<int64_t> sizes{place_Nk.size(0), rows_RD.size(1)};
  if (rows_RD.numel() == 0) return at::zeros(sizes, rows_RD.options());
  const Tensor sum_ND = at::empty(sizes, rows_RD.options());
  device_kernels()->combine_rows({.shape = shape_of(rows_RD, place_Nk),
                                  .rows = rows_RD.const_data_ptr(),
                                  .weights = pointer(weights_Nk),
                                  .out = sum_ND.mutable_data_ptr()},
                                 stream());
  return sum_ND;
}

Tensors split_gradients(const Tensor& grad_in, const Tensor& rows_in, const Tensor& weights_in,
                        const ExpertOrder& order) {
  const Tensor grad_ND = grad_in.contiguous(), rows_RD = rows_in.contiguous();
  const Tensor weights_Nk = weights_in.contiguous();
  const Tensor drows_RD = order.padded_rows > 0 ? at::zeros_like(rows_RD) : at::empty_like(rows_RD);
  if (rows_RD.numel() == 0) return {drows_RD, at::zeros_like(weights_Nk)};
  const Tensor dweights_Nk = at::empty_like(weights_Nk);
  device_kernels()->combine_rows_backward({.shape = shape_of(rows_RD, order.place_Nk),
                                           .grad = grad_ND.const_data_ptr(),
                                           .rows = rows_RD.const_data_ptr(),
                                           .weights = weights_Nk.const_data_ptr(),
                                           .d_rows = drows_RD.mutable_data_ptr(),
                                           .d_weights = dweights_Nk.mutable_data_ptr()},
                                          stream());
  return {drows_RD, dweights_Nk};
}

}  // namespace capstan::ops::on_device
