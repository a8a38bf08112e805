// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/plan/optimizer_states.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <utility>

#include "capstan/plan/frozen.h"
#include "plan/resolve_internal.h"

namespace capstan::plan {
namespace {

constexpr int64_t kSmallParameter = 4096;  // elements; below it a block is much of a parameter

bool fits_blocks(const ParamSpec& spec) {
  return spec.trainable && spec.block > 0 && spec.update == UpdateKind::kElementwise &&
         numel(spec.shape) >= kSmallParameter && spec.shape.back() % kStateBlock == 0;
}

// What is read by one product lies in one buffer, and experts of a layer are treated alike.
constexpr int kAlone = -1, kExperts = -2;
std::pair<int, int> unit_of(const ParamSpec& spec) {
  return {spec.block, spec.expert >= 0 ? kExperts : spec.fuse_group};
}

}  // namespace

std::vector<StateSpec> optimizer_states(const recipe::Optimizer& optimizer, DType master,
                                        UpdateKind update) {
  const bool in_blocks = update == UpdateKind::kRowBlock;
  const DType dtype = optimizer.moments == "bf16" ? DType::kBf16
                      : in_blocks                 ? DType::kUint8
                                                  : master;
  std::vector<StateSpec> states;
  const auto add = [&](const char* kind) {
    states.push_back({kind, dtype});
    if (in_blocks) states.push_back({std::string(kind) + "_scale", DType::kFp32, kStateBlock});
  };
  add("exp_avg");
  if (optimizer.name == "sophia")
    add("hessian");
  else if (optimizer.name != "lion")
    add("exp_avg_sq");
  return states;
}

int64_t state_bytes(const std::vector<StateSpec>& states, int64_t elements) {
  int64_t bytes = 0;
  for (const StateSpec& state : states)
    bytes += elements / state.block * static_cast<int64_t>(size_of(state.dtype));
  return bytes;
}

std::vector<ParamSpec> mark_row_blocks(std::vector<ParamSpec> table,
                                       const recipe::Optimizer& optimizer) {
  if (optimizer.moments != "int8") return table;
  std::map<std::pair<int, int>, bool> unit_fits;
  for (const ParamSpec& spec : table)
    if (unit_of(spec).second != kAlone) {
      const auto found = unit_fits.emplace(unit_of(spec), true).first;
      found->second = found->second && fits_blocks(spec);
    }
  for (ParamSpec& spec : table) {
    const auto unit = unit_fits.find(unit_of(spec));
    if (unit == unit_fits.end() ? fits_blocks(spec) : unit->second)
      spec.update = UpdateKind::kRowBlock;
  }
  return table;
}

bool rounds_by_index(const recipe::Optimizer& optimizer) {
  return optimizer.moments == "bf16" || (optimizer.moments == "int8" && optimizer.name == "sophia");
}

void check_row_blocks(Draft& draft, const ModelShape& shape) {
  const recipe::Optimizer& optimizer = draft.recipe.optimizer;
  if (optimizer.moments != "int8") return;
  const int64_t tensor = draft.recipe.parallel.tensor;
  const std::vector<ParamSpec> table = mark_row_blocks(
      freeze(find_family(shape.family).param_table(shape), draft.recipe.model.frozen), optimizer);
  bool any = false;
  for (const ParamSpec& spec : table) {
    if (spec.update != UpdateKind::kRowBlock) continue;
    any = true;
    const bool cuts_rows = spec.expert < 0 && spec.tensor.kind == ShardRule::Kind::kSplit &&
                           spec.tensor.dim + 1 == static_cast<int>(spec.shape.size());
    const int64_t parts = spec.tensor.units > 0 ? std::min(tensor, spec.tensor.units) : tensor;
    const int64_t blocks = spec.shape.back() / kStateBlock;
    if (!cuts_rows || blocks % parts == 0) continue;
    draft.refuse({"parallel.tensor", std::to_string(tensor),
                  fmt::format("a divisor of {}, the blocks in a row of {}", blocks, spec.name),
                  fmt::format("8-bit moments keep blocks of {} elements whole", kStateBlock),
                  fmt::format("Set parallel.tensor: {}, or optimizer.moments: bf16",
                              nearest_divisors(blocks, tensor))});
    return;  // other layers say the same
  }
  if (any) return;
  draft.refuse({"optimizer.moments", "int8", "auto or bf16",
                fmt::format("no trained parameter outside of the embedding has at least {} "
                            "elements in rows of a multiple of {}",
                            kSmallParameter, kStateBlock),
                "Leave the key out"});
}

}  // namespace capstan::plan
