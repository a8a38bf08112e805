// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The table of launchers of the library that includes it.
#pragma once
#include "capstan/kernels/api.h"

namespace capstan::kernels {

inline constexpr Api kLinkedApi{
    .copy = copy,
    .rms_norm_forward = rms_norm_forward,
    .layer_norm_forward = layer_norm_forward,
    .rms_norm_backward = rms_norm_backward,
    .layer_norm_backward = layer_norm_backward,
};

}  // namespace capstan::kernels
