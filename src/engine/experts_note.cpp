// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "engine/experts_note_internal.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "capstan/base/log.h"
#include "capstan/parallel/flat_store.h"
#include "capstan/plan/experts.h"

namespace capstan::engine {
namespace {

void log_form(const ops::GroupedCase& asked, const ops::GroupedChoice& choice, bool is_counted) {
  if (asked.on_cpu) return log::info("engine", "experts: a product for each");
  if (choice.form == ops::GroupedForm::kGrouped)
    return log::info("engine", "experts: one product for all of a layer{}",
                     is_counted
                         ? "; the host waits once per layer and pass for the rows that travel, "
                           "unless model.experts.capacity_factor bounds them"
                         : ", the host does not wait for their rows");
  const bool is_narrow = at::elementSize(asked.dtype) == 2;
  log::write(is_narrow ? log::Level::kWarning : log::Level::kInfo, "engine",
             fmt::format("experts: a product for each, and the host waits for their rows once per "
                         "layer and pass: {}{}{}",
                         choice.reason, choice.fix.empty() ? "" : ". ", choice.fix));
}

}  // namespace

ops::GroupedCase experts_case(const plan::Plan& plan, at::Device device) {
  const plan::ModelPlan& model = plan.model();
  const plan::ExpertShape& e = model.shape.experts;
  const auto dtype = parallel::scalar_type_of(plan.precision.compute);
  ops::GroupedCase asked = ops::grouped_case(device, dtype, e.count);
  asked.same_type =
      std::none_of(model.table().begin(), model.table().end(),
                   [](const plan::ParamSpec& spec) { return spec.expert >= 0 && spec.wide; });
  asked.groups = e.count / plan.grid.sizes().ep;
  asked.hidden = model.shape.hidden_size;
  asked.features = e.intermediate_size;
  asked.knows_rows = plan::knows_expert_rows(plan);
  return asked;
}

bool counts_travellers(const plan::Plan& plan) {
  return plan.grid.sizes().ep > 1 && !plan.model().shape.experts.capacity_factor;
}

std::string gradients_text(const ops::GroupedChoice& choice) {
  if (choice.rounding.empty()) return "weight gradients are summed in fp32";
  return "weight gradients are rounded to 16 bits once per micro-batch: " + choice.rounding;
}

void log_experts(const plan::Plan& plan, at::Device device) {
  const ops::GroupedCase asked = experts_case(plan, device);
  const ops::GroupedChoice choice = ops::choose_grouped(asked);
  log_form(asked, choice, counts_travellers(plan));
  if (at::elementSize(asked.dtype) == 2) log::info("engine", "experts: {}", gradients_text(choice));
}

}  // namespace capstan::engine
