// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The arithmetic of every reduction on CPU backends: one function, so that all backends give the
// same bits.
#pragma once
#include <c10/core/ScalarType.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "capstan/comm/communicator.h"

namespace capstan::comm {

// Throws InternalError for operations that the type does not have (kOr of floats, kSum of bool,
// complex types).
void check_reducible(at::ScalarType type, ReduceOp op);

// target[i] = sources[0][i] op sources[1][i] op ..., in this order, for i < count. fp16 and bf16
// are accumulated in fp32 and rounded once (nearest even). target may be one of the sources, but
// may not overlap one in part.
void reduce_in_rank_order(at::ScalarType type, ReduceOp op,
                          std::span<const std::byte* const> sources, std::byte* target,
                          int64_t count);

}  // namespace capstan::comm
