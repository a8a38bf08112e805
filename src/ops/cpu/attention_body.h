// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Body of the attention kernels, compiled once per instruction set.
#pragma once
#include "ops/cpu/attention_backward.h"
#include "ops/cpu/attention_forward.h"

namespace capstan::ops::cpu {
namespace {

constexpr AttentionKernels kAttentionKernels = {
    {attention_sizes<float>, attention_sizes<float>, attention_sizes<double>},
    {attention_forward<float>, attention_forward<Bf16>, attention_forward<double>},
    {attention_backward<float>, attention_backward<Bf16>, attention_backward<double>},
    {attention_sum_partials<float>, attention_sum_partials<Bf16>, attention_sum_partials<double>}};

}  // namespace
}  // namespace capstan::ops::cpu
