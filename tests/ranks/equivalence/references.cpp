// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "ranks/equivalence/references.h"

#include <fmt/format.h>

#include "capstan/base/text.h"

namespace capstan::test {

const ReferenceRun& References::of(const LayoutCase& layout) {
  const auto [run, is_new] = runs_.try_emplace(layout.model_key());
  if (is_new) run->second = run_reference(layout, kDeviceSteps);
  return run->second;
}

bool is_on_edge(const ReferenceRun& reference) {
  return reference.margin < 1e-9 || reference.direction < 1e-13;
}

std::string complaint_of(const LayoutCase& layout, const Comparison& result) {
  if (result.error() <= kDeviceBar) return "";
  return fmt::format(
      "{}\n  error {} (loss {}, norm {}, eval {}, experts {}, state {} in {}) {}\n  reproduce: {} "
      "ranks, --set {}",
      layout.describe(), result.error(), result.loss, result.norm, result.eval, result.experts,
      result.state, result.worst, result.failure, layout.ranks(),
      join(layout.overrides(), " --set "));
}

}  // namespace capstan::test
