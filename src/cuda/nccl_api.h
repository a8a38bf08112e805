// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The NCCL library as comm sees it.
#pragma once
#include <memory>

#include "capstan/comm/nccl_api.h"

namespace capstan::cuda {

// Throws EnvError when the library that was loaded is older than the header built against. Streams
// given to it hold a cudaStream_t.
[[nodiscard]] std::shared_ptr<comm::NcclApi> make_nccl_api();

}  // namespace capstan::cuda
