// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// How the experts of a layer are multiplied, as a function of nothing but what decides it. Layers
// and the log of a run ask the same function.
#pragma once
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <string>

#include "capstan/ops/path.h"

namespace capstan::ops {

// A product for each expert, whose rows the host has to know; or one for all, which finds the rows
// on the device.
enum class GroupedForm { kLoop, kGrouped };

struct GroupedCase {
  Path path = Path::kFused;  // as asked for: kFused or kReference
  bool on_cpu = true;
  bool has_order = false;                        // our kernels order choices among so many experts
  bool has_products = false;                     // of the device, in dtype
  at::ScalarType dtype = at::ScalarType::Float;  // of activations
  bool same_type = true;                         // the weights have it too
  int64_t groups = 0;                            // experts held here
  int64_t hidden = 0, features = 0;              // of each
  bool adds_wide = false;   // a product of factors in dtype adds to an fp32 matrix
  bool knows_rows = false;  // the host, of each expert, also where one product takes all
};
// What the process knows of it: all but same_type, groups, hidden, features and knows_rows.
// experts: of the layer, on all ranks.
[[nodiscard]] GroupedCase grouped_case(c10::Device device, at::ScalarType dtype, int64_t experts);

struct GroupedChoice {
  GroupedForm form = GroupedForm::kLoop;
  // Why a device takes the loop, and what would change that; else empty.
  std::string reason, fix;
  // Why weight gradients are rounded to 16 bits once per micro-batch before they are added; empty
  // where products add to the buffer in its own type.
  std::string rounding;
};
[[nodiscard]] GroupedChoice choose_grouped(const GroupedCase& c);

}  // namespace capstan::ops
