// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Legend: B samples, T tokens, N = B T, D hidden, E experts, k choices of a token, R rows, S rows
// of the micro-batch.
#include "capstan/nn/experts.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "capstan/base/check.h"
#include "capstan/ops/grouped_choice.h"
#include "capstan/ops/grouped_linear.h"
#include "capstan/ops/permute.h"
#include "capstan/ops/swiglu.h"
#include "capstan/plan/experts.h"

namespace capstan::nn {
namespace {

ops::RouterSpec router_spec(const plan::ExpertShape& e) {
  return {.per_token = e.per_token,
          .sigmoid = e.router == "sigmoid",
          .normalize = e.normalize_weights,
          .groups = e.groups,
          .groups_per_token = e.groups_per_token,
          .scaling = e.scaling};
}

// What a pass through the experts of one layer knows.
struct ExpertPass {
  const Context& context;
  int layer;
  const ExpertInput& input;
  const TokenPlaces& places;
  const ExpertCut& cut;

  [[nodiscard]] const plan::ExpertShape& shape() const { return input.shape; }
  [[nodiscard]] bool reports() const {
    return context.mode == param::Mode::kTrain && context.stats != nullptr;
  }
  [[nodiscard]] bool trains() const {
    return context.mode == param::Mode::kTrain || context.mode == param::Mode::kRecompute;
  }
  void report(const char* name, const Tensor& value) const {
    context.stats->add(name, layer, value);
  }

  [[nodiscard]] const param::RouterState& state() const {
    const auto at = static_cast<size_t>(layer);
    CAPSTAN_CHECK(at < context.routers.size(),
                  "layer {}: balancing needs the state of its router, the pass has {}", layer,
                  context.routers.size());
    return context.routers[at];
  }
  [[nodiscard]] Tensor bias() const {
    if (shape().bias_update_rate == 0) return {};
    CAPSTAN_CHECK(state().bias_E.defined(), "layer {}: no bias of the router", layer);
    return state().bias_E;
  }
  // E x fraction of the choices on each expert, per row or the same for all.
  [[nodiscard]] Tensor load_SE(const Tensor& experts_Nk, at::ScalarType wide) const;
  [[nodiscard]] ops::RouterLoss loss(const ops::Routing& routing) const;
  [[nodiscard]] Tensor keep(const Tensor& experts_Nk) const;
  // Rows of an expert for which there is room on every rank; 0 where their number is as chosen.
  [[nodiscard]] int64_t room(bool is_grouped, bool drops, int64_t tokens) const;
  void report_routing(const ops::Routing& routing, const ops::RouterSpec& spec,
                      const ops::RouterLoss& loss, const Tensor& keep_Nk) const;
};

Tensor ExpertPass::load_SE(const Tensor& experts_Nk, at::ScalarType wide) const {
  const int64_t count = shape().count;
  if (shape().auxiliary_scope == "global") {
    const Tensor fractions_E = state().fractions_E;
    CAPSTAN_CHECK(fractions_E.defined(), "layer {}: no fractions of the previous step", layer);
    return (fractions_E.to(experts_Nk.device(), wide) * static_cast<double>(count))
        .expand({places.rows, count});
  }
  const Tensor counts_SE =
      ops::count_choices(experts_Nk, places.row_N, places.rows, count).to(at::kDouble);
  if (cut.sum_rows) cut.sum_rows(counts_SE);
  const auto choices = static_cast<double>(shape().per_token * places.row_length);
  return (counts_SE * (static_cast<double>(count) / choices)).to(wide);
}

ops::RouterLoss ExpertPass::loss(const ops::Routing& routing) const {
  const plan::ExpertShape& e = shape();
  if (e.auxiliary_loss == 0 && e.z_loss == 0) return {};
  CAPSTAN_CHECK(context.rows_of_step > 0,
                "layer {}: losses on the router need the number of rows of the step", layer);
  const double per_token =
      context.loss_scale / (context.rows_of_step * static_cast<double>(places.row_length));
  ops::RouterLoss loss{.balance_SE = {}, .row_N = places.row_N, .z = e.z_loss * per_token};
  if (e.auxiliary_loss > 0)
    loss.balance_SE = load_SE(routing.experts_Nk, routing.scores_NE.scalar_type()) *
                      (e.auxiliary_loss * per_token);
  return loss;
}

Tensor ExpertPass::keep(const Tensor& experts_Nk) const {
  // While decoding, rows have no length yet.
  if (!shape().capacity_factor || context.mode == param::Mode::kDecode) return {};
  const ops::CapacitySpec spec{.rows = places.rows,
                               .row_length = places.row_length,
                               .experts = shape().count,
                               .capacity = plan::expert_capacity(shape(), places.row_length)};
  if (cut.keep) return cut.keep(experts_Nk, places, spec);
  return ops::keep_within_capacity(experts_Nk, places.row_N, places.place_N, spec);
}

int64_t ExpertPass::room(bool is_grouped, bool drops, int64_t tokens) const {
  if (!is_grouped || !drops || (cut.exchange && !cut.exchange_room)) return 0;
  if (cut.exchange)
    return plan::expert_room(shape(), places.rows, places.row_length, cut.most_tokens);
  return plan::own_expert_room(shape(), places.rows, places.row_length,
                               std::max(cut.most_tokens, tokens));
}

void ExpertPass::report_routing(const ops::Routing& routing, const ops::RouterSpec& spec,
                                const ops::RouterLoss& loss, const Tensor& keep_Nk) const {
  const auto wants = [&](const char* name) { return context.stats->wants(name); };
  const auto number = [](int64_t value) { return at::scalar_tensor(value, at::kLong); };
  report("chosen_experts", routing.experts_Nk);
  report("router_scores", routing.scores_NE);
  report("router_tokens", number(routing.experts_Nk.size(0)));
  if (wants("expert_tokens"))
    report("expert_tokens", ops::count_choices(routing.experts_Nk, at::zeros_like(places.row_N), 1,
                                               shape().count)[0]);
  report("expert_dropped", keep_Nk.defined() ? keep_Nk.logical_not().sum() : number(0));
  if (wants("router_entropy")) {
    Tensor shares_NE = routing.scores_NE.to(at::kDouble);
    if (spec.sigmoid) shares_NE = shares_NE / shares_NE.sum(-1, true);
    report("router_entropy", -at::xlogy(shares_NE, shares_NE).sum());
  }
  const auto values = ops::router_loss_values(routing, spec, loss);
  if (shape().auxiliary_loss > 0)
    report("router_auxiliary_loss", values.balance / context.loss_scale);
  if (shape().z_loss > 0) report("router_z_loss", values.z / context.loss_scale);
}

bool has_type(const std::vector<Projection>& projections, at::ScalarType type) {
  return std::all_of(projections.begin(), projections.end(), [&](const Projection& p) {
    return std::all_of(p.parts.begin(), p.parts.end(), [&](const ops::Param& part) {
      return !part.spec().wide && part.compute_dtype() == type;
    });
  });
}

bool in_one_product(const ExpertInput& input, const Tensor& x_ND) {
  const plan::ExpertShape& e = input.shape;
  ops::GroupedCase c = ops::grouped_case(x_ND.device(), x_ND.scalar_type(), e.count);
  c.same_type = has_type(input.gate_up, c.dtype) && has_type(input.down, c.dtype);
  c.groups = static_cast<int64_t>(input.gate_up.size());
  c.hidden = x_ND.size(1);
  c.features = e.intermediate_size;
  return ops::choose_grouped(c).form == ops::GroupedForm::kGrouped;
}

ops::RowGroups groups_of(const ops::ExpertOrder& order, int64_t room, at::Device device) {
  if (room > 0) return ops::equal_groups(order.ends_E.numel(), room, device);
  return {order.counts_E, order.ends_E};
}

ops::RowGroups groups_of(const ExpertCut::Exchange& exchange, bool is_grouped, bool are_equal,
                         at::Device device) {
  if (!is_grouped) return {exchange.counts, {}};
  if (!are_equal) return ops::with_ends(exchange.counts, device);
  return ops::equal_groups(static_cast<int64_t>(exchange.counts.size()), exchange.counts.front(),
                           device);
}

// The MLP of every expert held here, on rows in expert order.
Tensor expert_mlp(const ExpertInput& input, const Tensor& rows_RD, const ops::RowGroups& groups) {
  const Tensor gate_up_RF = ops::grouped_linear(rows_RD, input.gate_up, groups);
  return ops::grouped_linear(ops::swiglu(gate_up_RF), input.down, groups);
}

// Rows of the chosen experts, there and back.
Tensor run_chosen(const ExpertPass& pass, const Tensor& x_ND, const ops::Routing& routing,
                  const Tensor& keep_Nk, const Tensor& weights_Nk) {
  const ExpertInput& input = pass.input;
  const ExpertCut& cut = pass.cut;
  const bool is_grouped = in_one_product(input, x_ND);
  const int64_t room = pass.room(is_grouped, keep_Nk.defined(), x_ND.size(0));
  ops::ExpertOrder order =
      ops::order_by_expert(routing.experts_Nk, keep_Nk, input.shape.count,
                           /*on_device=*/is_grouped && (!cut.exchange || room > 0));
  if (room > 0) order = ops::with_room(order, routing.experts_Nk, room);
  const Tensor rows_RD = ops::permute_tokens(x_ND, order);
  if (!cut.exchange)
    return ops::combine_rows(expert_mlp(input, rows_RD, groups_of(order, room, x_ND.device())),
                             weights_Nk, order);
  const ExpertCut::Exchange exchange =
      room > 0 ? cut.exchange_room(input.shape.count, room) : cut.exchange(order.counts_E);
  const ops::RowGroups groups = groups_of(exchange, is_grouped, room > 0, x_ND.device());
  const Tensor y_RD = exchange.back(expert_mlp(input, exchange.out(rows_RD), groups));
  return ops::combine_rows(y_RD, weights_Nk, order);
}

}  // namespace

TokenPlaces places_of(const param::RowMap& rows, int64_t batch, int64_t tokens, int64_t first,
                      int64_t row_length, at::Device device) {
  const auto longs = at::TensorOptions().dtype(at::kLong).device(device);
  TokenPlaces places{.row_N = {}, .place_N = {}, .rows = batch, .row_length = row_length};
  const Tensor place_T =
      rows.row_index_T.defined()
          ? rows.row_index_T.narrow(0, first, tokens).to(longs, /*non_blocking=*/true)
          : at::arange(first, first + tokens, longs);
  places.place_N = place_T.repeat({batch});
  places.row_N = at::arange(batch, longs).unsqueeze(1).expand({batch, tokens}).reshape({-1});
  return places;
}

Tensor run_experts(const Context& context, int layer, const Tensor& x_ND, const ExpertInput& input,
                   const TokenPlaces& places, const ExpertCut& cut) {
  const ExpertPass pass{context, layer, input, places, cut};
  const ops::RouterSpec spec = router_spec(input.shape);
  CAPSTAN_CHECK(cut.exchange || static_cast<int64_t>(input.gate_up.size()) == input.shape.count,
                "layer {}: {} of {} experts without an exchange", layer, input.gate_up.size(),
                input.shape.count);
  ops::Routing routing;
  ops::RouterLoss loss;
  Tensor keep_Nk;
  {
    at::NoGradGuard no_grad;
    routing = ops::route(x_ND, input.router.weight(), pass.bias(), spec);
    keep_Nk = pass.keep(routing.experts_Nk);
  }
  const bool needs_loss =
      pass.trains() && (pass.reports() || ops::needs_backward({x_ND}, input.router.parts));
  {
    at::NoGradGuard no_grad;
    if (needs_loss) loss = pass.loss(routing);
    if (pass.reports()) pass.report_routing(routing, spec, loss, keep_Nk);
  }
  const Tensor weights_Nk = ops::router_weights(x_ND, input.router, routing, spec, loss);
  return run_chosen(pass, x_ND, routing, keep_Nk, weights_Nk);
}

Tensor Seams::experts(const Context& context, int layer, const Tensor& x_BTD,
                      const ExpertInput& input) {
  CAPSTAN_CHECK(context.rows, "a pass needs the map of its rows");
  const int64_t batch = x_BTD.size(0), tokens = x_BTD.size(1);
  const TokenPlaces places = places_of(*context.rows, batch, tokens, 0, tokens, x_BTD.device());
  return run_experts(context, layer, x_BTD.reshape({batch * tokens, -1}), input, places, {})
      .view(x_BTD.sizes());
}

}  // namespace capstan::nn
