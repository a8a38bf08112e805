// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// How pinned host memory grows: in slabs of powers of two, to which LibTorch rounds it up anyway.
// parallel::HostArena takes them by this rule, and the plan counts them by it. Torch-free.
#pragma once
#include <cstdint>
#include <span>

namespace capstan::plan {

inline constexpr int64_t kHostRound = 512;  // bytes; what is taken of a slab are multiples

// Bytes of a new slab for `needed` bytes beside `reserved` ones in slabs: as large as all before,
// from 1 MiB to 1 GiB, or the next power of two of what is needed.
[[nodiscard]] int64_t next_host_slab(int64_t reserved, int64_t needed);

// Bytes of all slabs when `requests` (bytes) have been taken in this order and none given back.
[[nodiscard]] int64_t host_slab_bytes(std::span<const int64_t> requests);

}  // namespace capstan::plan
