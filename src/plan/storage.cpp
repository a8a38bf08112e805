// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/plan/gradient_places.h"
#include "capstan/plan/optimizer_states.h"
#include "plan/memory_internal.h"

namespace capstan::plan {
namespace {

int64_t bucket_bytes_of(const Plan& plan, const RankLayout& layout) {
  int64_t bytes = 0;
  for (const auto& bucket : make_buckets(layout, plan.precision.gradients, plan.bucket_bytes)) {
    int64_t elements = 0;
    for (const int i : bucket) elements += layout.buffers[static_cast<size_t>(i)].numel;
    bytes += stored_bytes(elements, plan.precision.gradients, is_on_gpu(plan));
  }
  return bytes;
}

int64_t shared_bytes_of(const Plan& plan, const RankLayout& layout) {
  const SharedGradients shared =
      place_gradients(plan.grid, layout, plan.model().shape.tie_word_embeddings,
                      plan.model().layout.options().zero_stage);
  return stored_bytes(shared.numel, plan.precision.gradients, is_on_gpu(plan));
}

}  // namespace

bool stages_values(const Plan& plan, const FlatBuffer& buffer) {
  return plan.resolved.run.device == "cuda" && plan.resolved.parallel.zero.offload == "optimizer" &&
         value_dtype(plan.precision, buffer) != plan.precision.master;
}

void add_storage(MemoryReport& memory, const Plan& plan, const RankLayout& layout) {
  const int stage = plan.model().layout.options().zero_stage;
  const PrecisionPlan& precision = plan.precision;
  const std::string& offload = plan.resolved.parallel.zero.offload;
  const bool offloads = offload != "none", on_gpu = is_on_gpu(plan);
  const bool shares = plan.resolved.optimizer.in_backward;
  if (shares)
    memory.gradients += shared_bytes_of(plan, layout);
  else if (stage == 0)
    memory.gradients += bucket_bytes_of(plan, layout);
  for (const FlatBuffer& buffer : layout.buffers) {
    const int64_t shard = buffer.shard_numel();
    const DType values = value_dtype(precision, buffer);
    memory.parameters +=
        stored_bytes(stage == 3 ? shard : buffer.numel, values, on_gpu && offload != "all");
    // Values are the master where nothing differs.
    if (values != precision.master || offloads)
      memory.master += stored_bytes(shard, precision.master, on_gpu && !offloads);
    if (stages_values(plan, buffer)) memory.parameters += stored_bytes(shard, values);
    if (!buffer.trainable) continue;
    if (stage > 0 && !shares)
      memory.gradients +=
          stored_bytes(stage == 1 ? buffer.numel : shard, precision.gradients, on_gpu);
    if (offloads)
      memory.gradients += stored_bytes(shard, precision.gradients);  // for the optimizer
    for (const StateSpec& state :
         optimizer_states(plan.resolved.optimizer, precision.master, buffer.update))
      memory.optimizer += stored_bytes(shard / state.block, state.dtype, on_gpu && !offloads);
  }
}

}  // namespace capstan::plan
