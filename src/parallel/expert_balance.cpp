// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Legend: L layers of the model, E experts, X = E and the single numbers of a layer.
#include "capstan/parallel/expert_balance.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <string_view>

#include "capstan/base/check.h"
#include "capstan/device/accelerator.h"
#include "capstan/plan/experts.h"

namespace capstan::parallel {
namespace {

// The single numbers, in the order in which they stand behind the counts.
constexpr std::array<std::string_view, 5> kNumbers = {
    "expert_dropped", "router_tokens", "router_entropy", "router_auxiliary_loss", "router_z_loss"};

}  // namespace

double ExpertLoad::max_over_mean() const {
  const double sum = std::accumulate(tokens.begin(), tokens.end(), 0.0);
  if (sum == 0) return 1;
  return *std::max_element(tokens.begin(), tokens.end()) * static_cast<double>(tokens.size()) / sum;
}

double ExpertLoad::dropped_fraction() const {
  const double sum = std::accumulate(tokens.begin(), tokens.end(), 0.0);
  return sum == 0 ? 0 : dropped / sum;
}

ExpertBalance::ExpertBalance(const plan::ModelShape& shape, std::vector<int> layers,
                             at::ScalarType dtype)
    : shape_(shape), layers_(std::move(layers)) {
  const plan::ExpertShape& e = shape_.experts;
  const int64_t count = e.count, all = shape_.num_hidden_layers;
  const auto options = at::TensorOptions().dtype(dtype).device(device::run_device());
  if (e.bias_update_rate > 0) bias_LE_ = at::zeros({all, count}, options);
  if (e.auxiliary_loss > 0 && e.auxiliary_scope == "global")
    fractions_LE_ = at::full({all, count}, 1.0 / static_cast<double>(count), options);
  states_.resize(static_cast<size_t>(all));
  for (const int layer : layers_) {
    param::RouterState& state = states_.at(static_cast<size_t>(layer));
    if (bias_LE_.defined()) state.bias_E = bias_LE_[layer];
    if (fractions_LE_.defined()) state.fractions_E = fractions_LE_[layer];
  }
  sums_LX_ = at::zeros({all, count + static_cast<int64_t>(kNumbers.size())},
                       at::TensorOptions().dtype(at::kDouble).device(device::run_device()));
  closed_LX_ = at::zeros_like(sums_LX_);
}

void ExpertBalance::reset() { sums_LX_.zero_(); }

bool ExpertBalance::computes(int layer) const {
  return std::find(layers_.begin(), layers_.end(), layer) != layers_.end();
}

at::Tensor ExpertBalance::row(int layer) {
  CAPSTAN_CHECK(computes(layer), "statistics of layer {}, which is not of this rank", layer);
  return sums_LX_[layer];
}

bool ExpertBalance::wants(const char* name) const {
  return wants_entropy_ || std::string_view(name) != "router_entropy";
}

void ExpertBalance::add(const char* name, int layer, const at::Tensor& value) {
  at::NoGradGuard no_grad;
  if (listener_) listener_(name, layer, value, states_.at(static_cast<size_t>(layer)));
  const int64_t count = shape_.experts.count;
  if (std::string_view(name) == "expert_tokens") {
    row(layer).narrow(0, 0, count).add_(value);
    return;
  }
  const auto* const it = std::find(kNumbers.begin(), kNumbers.end(), std::string_view(name));
  if (it != kNumbers.end()) row(layer)[count + (it - kNumbers.begin())].add_(value);
}

std::vector<ExpertLoad> ExpertBalance::finish_step(const comm::Communicator& group, bool applied) {
  at::NoGradGuard no_grad;
  // The host's copy where they are on a device.
  const at::Tensor sums_LX = sums_LX_.is_cpu() ? sums_LX_.clone() : sums_LX_.cpu();
  if (group.size() > 1) group.control().all_reduce(sums_LX).wait();
  const at::Tensor tokens_LE = sums_LX.narrow(1, 0, shape_.experts.count);
  update(tokens_LE.to(sums_LX_.device()), at::scalar_tensor(applied, at::kBool));
  reset();
  return loads_of(sums_LX);
}

void ExpertBalance::finish_step_on_device(const comm::Communicator& group, const at::Tensor& skip) {
  at::NoGradGuard no_grad;
  if (group.size() > 1) group.control().all_reduce(sums_LX_).wait();
  closed_LX_.copy_(sums_LX_);
  update(closed_LX_.narrow(1, 0, shape_.experts.count), skip.eq(0));
  reset();
}

void ExpertBalance::send_loads() {
  sent_.push_back(
      device::accelerator()->empty_pinned(closed_LX_.sizes(), closed_LX_.scalar_type()));
  sent_.back().copy_(closed_LX_, /*non_blocking=*/true);
}

std::vector<ExpertLoad> ExpertBalance::receive_loads() {
  CAPSTAN_CHECK(!sent_.empty(), "loads of a step that sent none");
  const at::Tensor sums_LX = std::move(sent_.front());
  sent_.pop_front();
  return loads_of(sums_LX);
}

std::vector<ExpertLoad> ExpertBalance::loads_of(const at::Tensor& sums_LX) const {
  std::vector<ExpertLoad> loads;
  const int64_t count = shape_.experts.count, width = sums_LX.size(1);
  for (int layer = 0; layer < shape_.num_hidden_layers; ++layer) {
    const double* const x = sums_LX.const_data_ptr<double>() + layer * width;
    ExpertLoad load{.layer = layer, .tokens = {x, x + count}};
    load.dropped = x[count];
    load.routed_tokens = x[count + 1];
    load.entropy = load.routed_tokens > 0 ? x[count + 2] / load.routed_tokens : 0;
    load.auxiliary_loss = x[count + 3];
    load.z_loss = x[count + 4];
    loads.push_back(std::move(load));
  }
  return loads;
}

// Of layers to which no token came, as of skipped steps, nothing changes. is_applied may be on the
// CPU.
void ExpertBalance::update(const at::Tensor& tokens_LE, const at::Tensor& is_applied) {
  const at::Tensor sum_L1 = tokens_LE.sum(1, true);
  if (fractions_LE_.defined())
    fractions_LE_.copy_(at::where(sum_L1.gt(0).logical_and(is_applied), tokens_LE / sum_L1,
                                  fractions_LE_.to(at::kDouble)));
  if (!bias_LE_.defined()) return;
  // Exact comparison: counts are whole, and count x E against the sum avoids the rounded mean.
  const at::Tensor error_LE = sum_L1 - tokens_LE * static_cast<double>(shape_.experts.count);
  bias_LE_.add_(error_LE.sign().mul(is_applied).to(bias_LE_.scalar_type()),
                shape_.experts.bias_update_rate);
}

std::vector<mesh::StateEntry> ExpertBalance::state_entries(const std::string& model,
                                                           bool writes) const {
  std::vector<mesh::StateEntry> entries;
  const plan::ExpertNames& names = plan::expert_names(shape_.family);
  const plan::Shape shape{shape_.experts.count};
  for (const int layer : layers_) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    const param::RouterState& state = states_.at(static_cast<size_t>(layer));
    const auto add = [&](const std::string& name, const at::Tensor& tensor) {
      if (tensor.defined())
        entries.push_back(
            {model, "router", prefix + name, shape, plan::whole_box(shape), tensor, writes});
    };
    add(names.router_bias, state.bias_E);
    add(names.router_fractions, state.fractions_E);
  }
  return entries;
}

}  // namespace capstan::parallel
