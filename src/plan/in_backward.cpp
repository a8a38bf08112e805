// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// optimizer.in_backward: a block is updated before the gradients of the blocks below it exist, so
// nothing may depend on the gradient as a whole.
#include <fmt/format.h>

#include <string>

#include "plan/resolve_internal.h"

namespace capstan::plan {
namespace {

struct Checker {
  Draft& draft;
  void refuse(bool applies, const std::string& got, const std::string& why,
              const std::string& fix) const {
    if (!applies) return;
    draft.refuse({"optimizer.in_backward", "true with " + got, "false", why,
                  fix + ", or optimizer.in_backward: false"});
  }
};

// What the update of a block would have to wait for.
void check_waits(const Checker& c, const std::optional<BatchPlan>& batch) {
  const recipe::Recipe& r = c.draft.recipe;
  c.refuse(r.optimizer.max_grad_norm.has_value(),
           fmt::format("optimizer.max_grad_norm {:g}", r.optimizer.max_grad_norm.value_or(0)),
           "the gradient norm is known only behind the last update",
           "Set optimizer.max_grad_norm: none");
  c.refuse(r.optimizer.spike_skip.sigma.has_value(), "optimizer.spike_skip.sigma",
           "a step that has begun to update blocks cannot be skipped",
           "Set optimizer.spike_skip.sigma: none");
  c.refuse(r.precision.compute == "fp16" && !r.precision.loss_scale,
           "the dynamic loss scale of fp16", "it skips steps whose gradients overflow",
           "Set precision.loss_scale, or precision.compute: bf16");
  if (batch && batch->micro_batches > 1)
    c.refuse(true, fmt::format("{} micro-batches per step and rank", batch->micro_batches),
             "gradients that are added up over micro-batches would have to be whole",
             fmt::format("Set batch.global_samples: {} or batch.micro_samples: {}",
                         batch->global_samples / batch->micro_batches,
                         batch->micro_samples * batch->micro_batches));
}

void check_places(const Checker& c) {
  const recipe::Recipe& r = c.draft.recipe;
  const recipe::Pipeline& pipeline = r.parallel.pipeline;
  c.refuse(pipeline.size > 1 || pipeline.chunks > 1,
           fmt::format("parallel.pipeline of {} x {} stages", pipeline.size, pipeline.chunks),
           "stages collect the gradients of several micro-batches",
           "Set parallel.pipeline.size: 1 and parallel.pipeline.chunks: 1");
  c.refuse(pipeline.schedule == "zero_bubble", "parallel.pipeline.schedule zero_bubble",
           "it makes the gradients of weights behind the whole backward",
           "Set parallel.pipeline.schedule: 1f1b");
  c.refuse(r.parallel.zero.offload != "none", "parallel.zero.offload " + r.parallel.zero.offload,
           "updates on the host in the backward are not in this build",
           "Set parallel.zero.offload: none");
}

}  // namespace

void check_in_backward(Draft& draft, const std::optional<BatchPlan>& batch) {
  if (!draft.recipe.optimizer.in_backward) return;
  check_waits({draft}, batch);
  check_places({draft});
}

}  // namespace capstan::plan
