// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "support/fake_device/fake_kernels.h"

#include "kernels/api_table.h"
#include "support/fake_device/fake_device.h"

namespace capstan::test {
namespace {

using namespace capstan::kernels;

template <class T>
void to_host(T*& pointer) {
  if (pointer) pointer = static_cast<T*>(host_of(pointer));
}
void to_host(LogitRows& rows) {
  to_host(rows.logits);
  to_host(rows.targets);
}
void to_host(PermuteShape& shape) { to_host(shape.place); }
void to_host(QkNormShape& shape) {
  to_host(shape.q_weight);
  to_host(shape.k_weight);
  to_host(shape.cos);
  to_host(shape.sin);
  to_host(shape.positions);
}

// A launcher whose device pointers are the given members of its arguments.
template <class Args, auto kLaunch, auto... kPointers>
void launch(const Args& args, Stream stream) {
  const auto run = [args, stream] {
    Args on_host = args;
    (to_host(on_host.*kPointers), ...);
    kLaunch(on_host, stream);
  };
  record_for_graph(run);
  run();
}

using NF = NormForwardArgs;
using NB = NormBackwardArgs;
using QF = QkNormForwardArgs;
using QB = QkNormBackwardArgs;
using OA = OptimizerArgs;
using BA = BlockwiseArgs;
using CA = CurvatureArgs;
using SN = SquaredNormArgs;
using RF = RouterForwardArgs;
using RB = RouterBackwardArgs;
using EO = ExpertOrderArgs;
using CB = CombineRowsBackwardArgs;

template <auto kLaunch>
constexpr auto kNormForward = launch<NF, kLaunch, &NF::residual, &NF::hidden, &NF::weight,
                                     &NF::bias, &NF::sum, &NF::normed, &NF::mean, &NF::rstd>;
template <auto kLaunch>
constexpr auto kNormBackward =
    launch<NB, kLaunch, &NB::x, &NB::mean, &NB::rstd, &NB::weight, &NB::grad, &NB::grad_residual,
           &NB::dx, &NB::d_hidden, &NB::grad_weight, &NB::grad_bias, &NB::partial>;
template <auto kLaunch>
constexpr auto kActivation = launch<ActivationArgs, kLaunch, &ActivationArgs::x,
                                    &ActivationArgs::grad, &ActivationArgs::out>;
template <auto kLaunch>
constexpr auto kOptimizer = launch<OA, kLaunch, &OA::state, &OA::tiles, &OA::weights, &OA::gradient,
                                   &OA::first, &OA::second, &OA::copy>;

template <auto kLaunch>
constexpr auto kBlockwise =
    launch<BA, kLaunch, &BA::state, &BA::tiles, &BA::codes, &BA::weights, &BA::gradient_values,
           &BA::first, &BA::second, &BA::first_scale, &BA::second_scale, &BA::copy>;

Api make_api() {
  Api api = kLinkedApi;
  api.copy = launch<CopyArgs, copy, &CopyArgs::from, &CopyArgs::to>;
  api.rms_norm_forward = kNormForward<rms_norm_forward>;
  api.layer_norm_forward = kNormForward<layer_norm_forward>;
  api.rms_norm_backward = kNormBackward<rms_norm_backward>;
  api.layer_norm_backward = kNormBackward<layer_norm_backward>;
  api.rope =
      launch<RopeArgs, rope, &RopeArgs::x, &RopeArgs::cos, &RopeArgs::sin, &RopeArgs::positions>;
  api.qk_norm_rope_forward =
      launch<QF, qk_norm_rope_forward, &QF::shape, &QF::x, &QF::out, &QF::rstd>;
  api.qk_norm_rope_backward =
      launch<QB, qk_norm_rope_backward, &QB::shape, &QB::x, &QB::rstd, &QB::grad, &QB::dx,
             &QB::grad_q_weight, &QB::grad_k_weight, &QB::partial>;
  api.activation_forward = kActivation<activation_forward>;
  api.activation_backward = kActivation<activation_backward>;
  api.embedding_forward =
      launch<EmbeddingForwardArgs, embedding_forward, &EmbeddingForwardArgs::table,
             &EmbeddingForwardArgs::ids, &EmbeddingForwardArgs::out>;
  api.embedding_backward =
      launch<EmbeddingBackwardArgs, embedding_backward, &EmbeddingBackwardArgs::grad,
             &EmbeddingBackwardArgs::ids, &EmbeddingBackwardArgs::buffer,
             &EmbeddingBackwardArgs::workspace>;
  api.cross_entropy = launch<CrossEntropyArgs, cross_entropy, &CrossEntropyArgs::logits,
                             &CrossEntropyArgs::weights, &CrossEntropyArgs::logprob>;
  api.logit_stats = launch<LogitStatsArgs, logit_stats, &LogitStatsArgs::logits,
                           &LogitStatsArgs::top, &LogitStatsArgs::sum, &LogitStatsArgs::picked>;
  api.logit_gradient = launch<LogitGradientArgs, logit_gradient, &LogitGradientArgs::logits,
                              &LogitGradientArgs::lse, &LogitGradientArgs::weights>;
  api.adamw = kOptimizer<adamw>;
  api.lion = kOptimizer<lion>;
  api.sophia = kOptimizer<sophia>;
  api.adamw_blockwise = kBlockwise<adamw_blockwise>;
  api.lion_blockwise = kBlockwise<lion_blockwise>;
  api.sophia_blockwise = kBlockwise<sophia_blockwise>;
  api.sophia_curvature = launch<CA, sophia_curvature, &CA::state, &CA::tiles, &CA::gradient,
                                &CA::curvature, &CA::codes, &CA::curvature_scale>;
  api.squared_norm =
      launch<SN, squared_norm, &SN::values, &SN::tiles, &SN::partial, &SN::sum, &SN::non_finite>;
  api.decide_step =
      launch<DecideStepArgs, decide_step, &DecideStepArgs::sums, &DecideStepArgs::is_void,
             &DecideStepArgs::windows, &DecideStepArgs::state>;
  api.amax = launch<AmaxArgs, amax, &AmaxArgs::values, &AmaxArgs::amax>;
  api.fp8_scale = launch<Fp8ScaleArgs, fp8_scale, &Fp8ScaleArgs::amax, &Fp8ScaleArgs::scale,
                         &Fp8ScaleArgs::inverse_scale>;
  api.cast_fp8 = launch<CastFp8Args, cast_fp8, &CastFp8Args::x, &CastFp8Args::scale,
                        &CastFp8Args::out, &CastFp8Args::transposed, &CastFp8Args::amax>;
  api.cast_rows_fp8 = launch<CastRowsFp8Args, cast_rows_fp8, &CastRowsFp8Args::x,
                             &CastRowsFp8Args::out, &CastRowsFp8Args::inverse_scale>;
  api.router_forward =
      launch<RF, router_forward, &RF::logits, &RF::bias, &RF::scores, &RF::chosen, &RF::weights>;
  api.router_backward = launch<RB, router_backward, &RB::logits, &RB::chosen, &RB::grad_weights,
                               &RB::balance, &RB::row, &RB::grad_logits>;
  api.expert_order = launch<EO, expert_order, &EO::chosen, &EO::keep, &EO::place, &EO::slot,
                            &EO::counts, &EO::workspace>;
  api.permute_tokens = launch<PermuteTokensArgs, permute_tokens, &PermuteTokensArgs::shape,
                              &PermuteTokensArgs::x, &PermuteTokensArgs::rows>;
  api.combine_rows =
      launch<CombineRowsArgs, combine_rows, &CombineRowsArgs::shape, &CombineRowsArgs::rows,
             &CombineRowsArgs::weights, &CombineRowsArgs::out>;
  api.combine_rows_backward = launch<CB, combine_rows_backward, &CB::shape, &CB::grad, &CB::rows,
                                     &CB::weights, &CB::d_rows, &CB::d_weights>;
  api.fill_normal = launch<FillNormalArgs, fill_normal, &FillNormalArgs::out>;
  return api;
}

}  // namespace

const Api& fake_kernels() {
  static const Api api = make_api();
  return api;
}

}  // namespace capstan::test
