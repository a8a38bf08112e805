// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include "capstan/plan/fp8.h"
#include "plan/resolve_internal.h"

namespace capstan::plan {
namespace {

DType dtype_of(Draft& draft, const std::string& key, const std::string& name) {
  const std::optional<DType> dtype = dtype_from_name(name);
  if (dtype) return *dtype;
  draft.refuse({key, "'" + name + "'", "bf16, fp16, fp32 or fp64", "", ""});
  return DType::kFp32;
}

// master and gradients: their default follows a compute type of fp64; what the user wrote must
// already.
DType wide_dtype(Draft& draft, const char* key, std::string& name, DType compute) {
  if (compute == DType::kFp64 && name != "fp64") {
    if (draft.is_given(key))
      draft.refuse({key, name, "fp64", "precision.compute is fp64", "Leave the key out"});
    else
      draft.choose(key, "fp64", "precision.compute is fp64");
    name = "fp64";
  }
  return dtype_of(draft, key, name);
}

// What gradients are summed in between ranks: their own type, or a narrower one for less traffic.
DType reduction_dtype(Draft& draft, const PrecisionPlan& plan) {
  recipe::Precision& precision = draft.recipe.precision;
  const char* key = "precision.reduction";
  if (precision.reduction == "auto") {
    precision.reduction = precision.gradients;
    draft.choose(key, precision.reduction, "precision.gradients");
  }
  const DType dtype = dtype_of(draft, key, precision.reduction);
  if (size_of(dtype) > size_of(plan.gradients))
    draft.refuse({key, precision.reduction,
                  fmt::format("precision.gradients {} or a narrower type", precision.gradients),
                  "sums of narrower numbers gain nothing from it", "Leave the key out"});
  if (dtype == DType::kFp16 && plan.compute != DType::kFp16)
    draft.refuse({key, "fp16", "bf16", "without the loss scale of fp16 small gradients vanish",
                  "Set precision.reduction: bf16"});
  return dtype;
}

}  // namespace

PrecisionPlan resolve_precision(Draft& draft) {
  recipe::Precision& precision = draft.recipe.precision;
  if (precision.compute == "auto" && uses_fp8(draft.recipe)) {
    precision.compute = "bf16";
    draft.choose("precision.compute", "bf16", "the rest of a run in fp8");
  }
  if (precision.compute == "auto") {
    precision.compute = draft.topology.fast_bf16 ? "bf16" : "fp32";
    draft.choose("precision.compute", precision.compute,
                 draft.topology.fast_bf16 ? "fast bf16 here" : "no fast bf16 here");
  }
  PrecisionPlan plan{};
  plan.compute = dtype_of(draft, "precision.compute", precision.compute);
  if (precision.residual == "auto") {
    const bool on_cpu = draft.recipe.run.device == "cpu", is_fp64 = plan.compute == DType::kFp64;
    precision.residual = on_cpu && !is_fp64 ? "fp32" : precision.compute;
    draft.choose("precision.residual", precision.residual,
                 on_cpu && !is_fp64 ? "fp32 on cpu" : "precision.compute");
  }
  plan.residual = dtype_of(draft, "precision.residual", precision.residual);
  if (plan.residual != plan.compute && size_of(plan.residual) <= size_of(plan.compute))
    draft.refuse({"precision.residual", precision.residual,
                  fmt::format("precision.compute {} or a wider type", precision.compute),
                  "the residual stream carries every layer's sum", "Set precision.residual: auto"});
  plan.master = wide_dtype(draft, "precision.master", precision.master, plan.compute);
  plan.gradients = wide_dtype(draft, "precision.gradients", precision.gradients, plan.compute);
  plan.reduction = reduction_dtype(draft, plan);
  const bool is_fp16 = plan.compute == DType::kFp16;
  if (precision.loss_scale && !is_fp16)
    draft.refuse({"precision.loss_scale", fmt::format("{}", *precision.loss_scale), "dynamic",
                  fmt::format("only fp16 gradients need a scale, compute is {}", precision.compute),
                  "Leave the key out"});
  plan.dynamic_loss_scale = is_fp16 && !precision.loss_scale;
  plan.loss_scale = is_fp16 ? precision.loss_scale.value_or(65536.0) : 1.0;
  return plan;
}

}  // namespace capstan::plan
