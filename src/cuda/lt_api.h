// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The cuBLASLt library as ops sees it.
#pragma once
#include <memory>

#include "capstan/ops/lt_api.h"

namespace capstan::cuda {

// Of the process's GPU: after it was set. Streams given to it hold a cudaStream_t. The library is
// started by the first call that needs it.
[[nodiscard]] std::shared_ptr<ops::LtApi> make_lt_api();

}  // namespace capstan::cuda
