// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// All launchers as function pointers: code that does not link CUDA holds an Api, tests pass their
// own. docs/design/kernels.md describes the kernels.
#pragma once
#include "capstan/kernels/activation.h"
#include "capstan/kernels/copy.h"
#include "capstan/kernels/cross_entropy.h"
#include "capstan/kernels/embedding.h"
#include "capstan/kernels/fp8.h"
#include "capstan/kernels/init.h"
#include "capstan/kernels/norm.h"
#include "capstan/kernels/optimizer.h"
#include "capstan/kernels/permute.h"
#include "capstan/kernels/qk_norm.h"
#include "capstan/kernels/rope.h"
#include "capstan/kernels/router.h"

namespace capstan::kernels {

template <class Args>
using Launcher = void (*)(const Args& args, Stream stream);

struct Api {
  Launcher<CopyArgs> copy;
  Launcher<NormForwardArgs> rms_norm_forward, layer_norm_forward;
  Launcher<NormBackwardArgs> rms_norm_backward, layer_norm_backward;
  Launcher<RopeArgs> rope;
  Launcher<QkNormForwardArgs> qk_norm_rope_forward;
  Launcher<QkNormBackwardArgs> qk_norm_rope_backward;
  Launcher<ActivationArgs> activation_forward, activation_backward;
  Launcher<EmbeddingForwardArgs> embedding_forward;
  Launcher<EmbeddingBackwardArgs> embedding_backward;
  Launcher<CrossEntropyArgs> cross_entropy;
  Launcher<LogitStatsArgs> logit_stats;
  Launcher<RescaleSumsArgs> rescale_sums;
  Launcher<FinishStatsArgs> finish_stats;
  Launcher<LogitGradientArgs> logit_gradient;
  Launcher<OptimizerArgs> adamw, lion, sophia;
  Launcher<BlockwiseArgs> adamw_blockwise, lion_blockwise, sophia_blockwise;
  Launcher<CurvatureArgs> sophia_curvature;
  Launcher<SquaredNormArgs> squared_norm;
  Launcher<DecideStepArgs> decide_step;
  Launcher<FillNormalArgs> fill_normal;
  Launcher<AmaxArgs> amax;
  Launcher<Fp8ScaleArgs> fp8_scale;
  Launcher<CastFp8Args> cast_fp8;
  Launcher<CastRowsFp8Args> cast_rows_fp8;
  Launcher<RouterForwardArgs> router_forward;
  Launcher<RouterBackwardArgs> router_backward;
  Launcher<ExpertOrderArgs> expert_order;
  Launcher<PermuteTokensArgs> permute_tokens;
  Launcher<CombineRowsArgs> combine_rows;
  Launcher<CombineRowsBackwardArgs> combine_rows_backward;
  // What launchers need beside their arguments; on the host.
  int64_t (*norm_partial_rows)(int64_t rows);
  size_t (*embedding_workspace_bytes)(const EmbeddingShape& shape);
  size_t (*expert_order_workspace_bytes)(int64_t slots, int64_t experts);
  std::vector<Tile> (*cut_tiles)(std::span<const FlatRange> ranges);
};

// In the CUDA library alone.
[[nodiscard]] const Api& cuda_api();

}  // namespace capstan::kernels
