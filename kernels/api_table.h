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
    .rope = rope,
    .qk_norm_rope_forward = qk_norm_rope_forward,
    .qk_norm_rope_backward = qk_norm_rope_backward,
    .activation_forward = activation_forward,
    .activation_backward = activation_backward,
    .embedding_forward = embedding_forward,
    .embedding_backward = embedding_backward,
    .cross_entropy = cross_entropy,
    .logit_stats = logit_stats,
    .rescale_sums = rescale_sums,
    .finish_stats = finish_stats,
    .logit_gradient = logit_gradient,
    .adamw = adamw,
    .lion = lion,
    .sophia = sophia,
    .adamw_blockwise = adamw_blockwise,
    .lion_blockwise = lion_blockwise,
    .sophia_blockwise = sophia_blockwise,
    .sophia_curvature = sophia_curvature,
    .squared_norm = squared_norm,
    .decide_step = decide_step,
    .fill_normal = fill_normal,
    .amax = amax,
    .fp8_scale = fp8_scale,
    .cast_fp8 = cast_fp8,
    .cast_rows_fp8 = cast_rows_fp8,
    .router_forward = router_forward,
    .router_backward = router_backward,
    .expert_order = expert_order,
    .permute_tokens = permute_tokens,
    .combine_rows = combine_rows,
    .combine_rows_backward = combine_rows_backward,
    .norm_partial_rows = norm_partial_rows,
    .embedding_workspace_bytes = embedding_workspace_bytes,
    .expert_order_workspace_bytes = expert_order_workspace_bytes,
    .cut_tiles = cut_tiles,
};

}  // namespace capstan::kernels
