// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Parts of report_memory. Storage is counted as it is allocated: one tensor per flat buffer for
// values, master and each moment, one per bucket for gradients.
#pragma once
#include "capstan/plan/plan.h"
#include "plan/saturate_internal.h"

namespace capstan::plan {

[[nodiscard]] inline bool is_on_gpu(const Plan& plan) { return plan.resolved.run.device == "cuda"; }
[[nodiscard]] inline int64_t stored_bytes(int64_t elements, DType dtype, bool on_gpu = false) {
  return allocation_bytes(saturating_multiply(elements, static_cast<int64_t>(size_of(dtype))),
                          on_gpu);
}

// Whether values of the buffer pass through host memory on their way from the optimizer there.
[[nodiscard]] bool stages_values(const Plan& plan, const FlatBuffer& buffer);
// What lives as long as the run: values, master, gradients, moments.
void add_storage(MemoryReport& memory, const Plan& plan, const RankLayout& layout);

// The largest moment of a step, on top of storage.
struct StepMoment {
  int64_t activations = 0, workspace = 0, communication = 0;
  int64_t values = 0;     // stage 3: weights that are gathered
  int64_t gradients = 0;  // stages 2 and 3: whole gradients, being collected or summed
  int64_t host = 0;       // most of a step: activations that have left the device
  [[nodiscard]] int64_t total() const {
    return activations + workspace + communication + values + gradients;
  }
};
// MemoryReport's `device`, from the rest of the report, the part of `host` that zero.offload keeps
// there, and `host_taken` for that and for `activations` bytes.
[[nodiscard]] int64_t device_bytes(const Plan& plan, const MemoryReport& tensors);
[[nodiscard]] int64_t host_bytes(const Plan& plan, const RankLayout& layout);
[[nodiscard]] int64_t host_taken_bytes(const Plan& plan, const RankLayout& layout,
                                       const MemoryReport& report, int64_t activations);
// Sequences that attention of variable lengths is counted for: documents are in the corpus, not in
// the recipe. Assumed: of 256 tokens or more on average, and at least one in each row.
[[nodiscard]] int64_t assumed_documents(int64_t samples, int64_t row_length);
[[nodiscard]] StepMoment find_peak(const Plan& plan, const RankLayout& layout, int pipeline_rank);

}  // namespace capstan::plan
