// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "capstan/base/check.h"
#include "capstan/param/param.h"

namespace capstan::param {
namespace {

constexpr int64_t kTaskElements = 32768;

// ATen's add_ of mixed dtypes converts through a temporary; this is one pass at memory speed.
void add_bf16(float* __restrict into, const uint16_t* __restrict from, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    into[i] += __builtin_bit_cast(float, static_cast<uint32_t>(from[i]) << 16);
}

}  // namespace

void add_to_slot(GradSlot& slot, const Tensor& gradient) {
  CAPSTAN_CHECK(slot.buffer.numel() == gradient.numel(), "gradient of {} elements for a slot of {}",
                gradient.numel(), slot.buffer.numel());
  const Tensor shaped = gradient.view_as(slot.buffer);
  if (slot.overwrite) {
    slot.buffer.copy_(shaped);
    slot.overwrite = false;
    return;
  }
  if (slot.buffer.is_cpu() && slot.buffer.scalar_type() == at::kFloat &&
      shaped.scalar_type() == at::kBFloat16 && slot.buffer.is_contiguous() &&
      shaped.is_contiguous()) {
    float* const into = slot.buffer.data_ptr<float>();
    const auto* const from = static_cast<const uint16_t*>(shaped.const_data_ptr());
    at::parallel_for(0, shaped.numel(), kTaskElements, [&](int64_t begin, int64_t end) {
      add_bf16(into + begin, from + begin, end - begin);
    });
    return;
  }
  slot.buffer.add_(shaped);
}

}  // namespace capstan::param
