// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// run.graphs: a graph repeats what was recorded, so nothing in a step may depend on what the host
// learns in it.
#include <string>

#include "plan/moe_internal.h"
#include "plan/resolve_internal.h"

namespace capstan::plan {
namespace {

// What kernels/router.cu has no room for.
bool has_large_router(const recipe::Experts& e) {
  return e.count > 512 || e.per_token > 32 || e.groups > 32;
}

}  // namespace

void check_graphs(Draft& draft) {
  const recipe::Recipe& r = draft.recipe;
  if (!r.run.graphs) return;
  const auto refuse = [&](bool applies, const std::string& why, const std::string& fix) {
    if (applies) draft.refuse({"run.graphs", "true", "false", why, fix + ", or run.graphs: false"});
  };
  const std::string not_yet = " is not in this build";
  refuse(r.run.device == "cpu", "graphs are a GPU's", "Set run.device: cuda");
  if (r.model.experts.count > 0) {
    refuse(has_large_router(r.model.experts),
           "routers of more than 512 experts, 32 choices or 32 groups choose on the host",
           "Set model.experts.count, per_token and groups to no more");
    refuse(r.parallel.expert > 1 && !r.model.experts.capacity_factor,
           "the host counts the rows that travel between experts without a capacity",
           "Set parallel.expert: 1, or model.experts.capacity_factor");
    if (const auto obstacle = grouped_obstacle(r))
      refuse(true, "the host counts the rows of experts, as " + obstacle->why, obstacle->fix);
  }
  refuse(r.optimizer.name == "sophia" && r.precision.compute == "fp16" && !r.precision.loss_scale,
         "the pass for sophia's curvature is recorded with one loss scale",
         "Set precision.loss_scale");
  refuse(r.parallel.zero.offload != "none" || r.parallel.offload_activations,
         "a graph with parallel.zero.offload or parallel.offload_activations" + not_yet,
         "Set parallel.zero.offload: none and parallel.offload_activations: false");
}

}  // namespace capstan::plan
