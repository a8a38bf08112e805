// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/grouped_choice.h"

#include <fmt/format.h>

#include "ops/experts_on_device_internal.h"
#include "ops/gemm_internal.h"
#include "ops/on_device_internal.h"

namespace capstan::ops {
namespace {

// LibTorch's kernel takes fewer groups than this, and rows of whole 16 bytes.
constexpr int64_t kMostGroups = 1024, kRowBytes = 16;

GroupedChoice loop(std::string reason, std::string fix) {
  return {GroupedForm::kLoop, std::move(reason), std::move(fix), ""};
}

GroupedChoice choose_by_sizes(const GroupedCase& c) {
  const int64_t step = kRowBytes / static_cast<int64_t>(c10::elementSize(c.dtype));
  if (c.groups >= kMostGroups)
    return loop(fmt::format("{} experts on a rank, a grouped product takes fewer than {}", c.groups,
                            kMostGroups),
                "Set parallel.expert so that ranks share them");
  if (c.hidden % step != 0)
    return loop(
        fmt::format("rows of {} numbers, a grouped product takes multiples of {}", c.hidden, step),
        "Set model.hidden_size to one");
  if (c.features % step != 0)
    return loop(fmt::format("experts of {} features, a grouped product takes multiples of {}",
                            c.features, step),
                "Set model.experts.intermediate_size to one");
  return {GroupedForm::kGrouped, "", "", ""};
}

GroupedChoice choose_form(const GroupedCase& c) {
  if (c.on_cpu) return {};
  if (c.path == Path::kReference) return loop("CAPSTAN_OPS is reference", "Unset it");
  if (!c.has_order) return loop("choices are put into the order of experts by the host", "");
  if (!c.has_products && c.dtype != at::kBFloat16)
    return loop(fmt::format("LibTorch multiplies groups of rows in bf16, not in {}",
                            on_device::name_of_type(c.dtype)),
                "Set precision.compute: bf16");
  if (!c.has_products)
    return loop("LibTorch multiplies groups of rows on compute capability 9.0, not on this device",
                "");
  if (!c.same_type)
    return loop("weights of experts have another type than their inputs",
                "Take them out of precision.keep_fp32");
  return choose_by_sizes(c);
}

std::string rounding_of(const GroupedCase& c, GroupedForm form) {
  if (c10::elementSize(c.dtype) != 2) return "";
  if (form == GroupedForm::kGrouped && !c.knows_rows)
    return "the product of all has a bf16 result, and only the device knows the rows of each";
  if (c.adds_wide) return "";
  if (c.path == Path::kReference) return "CAPSTAN_OPS is reference";
  return "products have a 16-bit result on CPUs, but with AMX and in bf16";
}

}  // namespace

GroupedCase grouped_case(c10::Device device, at::ScalarType dtype, int64_t experts) {
  const device::Accelerator* const accelerator = device::accelerator();
  const bool on_cpu = device.is_cpu() || !accelerator;
  return {.path = path(),
          .on_cpu = on_cpu,
          .has_order = !on_cpu && device_kernels() != nullptr && on_device::takes_order(0, experts),
          .has_products = !on_cpu && accelerator->has_grouped_products(dtype),
          .dtype = dtype,
          .adds_wide = adds_wide(device, dtype)};
}

GroupedChoice choose_grouped(const GroupedCase& c) {
  GroupedChoice choice = choose_form(c);
  choice.rounding = rounding_of(c, choice.form);
  return choice;
}

}  // namespace capstan::ops
