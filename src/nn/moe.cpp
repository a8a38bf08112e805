// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Llama with experts in the place of every MLP: the chosen ones of each token, and one that all
// tokens share. Legend: B samples, T tokens, D hidden, F features of the shared expert.
#include <ATen/ATen.h>

#include "capstan/base/error.h"
#include "capstan/nn/experts.h"
#include "capstan/ops/gate.h"
#include "capstan/ops/linear.h"
#include "capstan/ops/swiglu.h"
#include "capstan/plan/experts.h"
#include "nn/llama_internal.h"

namespace capstan::nn {
namespace {

struct MoeLayer final : DecoderLayer {
  ExpertInput experts;
  Projection shared_gate_up, shared_down;  // empty without a shared expert
  Projection shared_gate;                  // empty without a gate

  using DecoderLayer::DecoderLayer;

  Tensor mlp(const Context& context, Seams& seams, const Tensor& x_BTD) const override {
    const auto all = [&seams, this](const Context& pass, const Tensor& x) {
      const Tensor chosen_BTD = seams.experts(pass, index, x, experts);
      if (shared_down.parts.empty()) return chosen_BTD;
      return chosen_BTD + shared(pass, seams, x);
    };
    return run_part(remade.mlp, context, x_BTD, all);
  }

 private:
  // Its gate acts on the residual stream: every rank of the tensor axis that holds a token computes
  // the whole of it.
  Tensor shared(const Context& context, Seams& seams, const Tensor& x_BTD) const {
    const Tensor gate_up_BTF = seams.column(context, x_BTD, {&shared_gate_up, 1}).front();
    const Tensor y_BTD = seams.row(context, ops::swiglu(gate_up_BTF), shared_down);
    if (shared_gate.parts.empty()) return y_BTD;
    return ops::gated(y_BTD, ops::linear(x_BTD, shared_gate));
  }
};

std::unique_ptr<Block> build_layer(const plan::ModelShape& shape, const ModelOptions& options,
                                   int index, const LayerParams& params) {
  const plan::ExpertNames& names = plan::expert_names(shape.family);
  auto layer = std::make_unique<MoeLayer>(shape, options, index, params);
  layer->experts.shape = shape.experts;
  layer->experts.router = params.projection({names.router});
  const int held = static_cast<int>(shape.experts.count) / options.expert_ranks;
  for (int e = options.expert_rank * held; e < (options.expert_rank + 1) * held; ++e) {
    layer->experts.gate_up.push_back(
        params.projection({names.of(e, names.gate), names.of(e, names.up)}));
    layer->experts.down.push_back(params.projection({names.of(e, names.down)}));
  }
  if (shape.experts.shared_intermediate_size == 0) return layer;
  layer->shared_gate_up = params.projection({names.shared + "gate_proj", names.shared + "up_proj"});
  layer->shared_down = params.projection({names.shared + "down_proj"});
  if (shape.experts.shared_gate) layer->shared_gate = params.projection({names.shared_gate});
  return layer;
}

void check_experts(const plan::ModelShape& shape, const ModelOptions& options) {
  if (shape.experts.count > 0 && shape.experts.count % options.expert_ranks == 0) return;
  throw ConfigError(ErrorText{.module = "nn",
                              .what = "building a " + shape.family + " model",
                              .got = std::to_string(shape.experts.count) + " experts over " +
                                     std::to_string(options.expert_ranks) + " ranks",
                              .need = "at least one, and as many on each rank",
                              .why = "experts take the place of every MLP and are not cut",
                              .fix = "Set model.experts.count to a multiple of parallel.expert"});
}

}  // namespace

Model build_moe(const plan::ModelShape& shape, const ModelOptions& options, const FindParam& find) {
  check_experts(shape, options);
  return build_decoder(shape, options, find, [&](int index, const LayerParams& params) {
    return build_layer(shape, options, index, params);
  });
}

}  // namespace capstan::nn
