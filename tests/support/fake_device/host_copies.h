// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Copies between pinned host memory and the device that the host has not waited for.
#pragma once
#include <ATen/core/Tensor.h>

#include "support/fake_device/timeline.h"

namespace capstan::test::fake {

// `host` holds NaN (integers: -1) until the host has waited for `copy`; then `value` is put there.
// Throws MissingWait when an earlier copy from or to the same memory is not ordered before it.
void arrive_later(const at::Tensor& host, const at::Tensor& value, const Access& copy);
// `host` must not change until the host has waited for `copy`.
void hold_source(const at::Tensor& host, const Access& copy);
// A copy on `stream` reads `host`: makes what was sent there arrive. Throws MissingWait when the
// stream is not ordered behind one of these copies.
void arrive_for(const at::Tensor& host, int stream);
// Called when the host has waited. Throws MissingWait for a source that was changed too early.
void settle_host_copies();

}  // namespace capstan::test::fake
