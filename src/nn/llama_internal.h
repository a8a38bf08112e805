// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The blocks of Llama, and what decoders that differ in their MLP alone share with it. Legend: B
// samples, T tokens, D hidden.
#pragma once
#include <functional>
#include <memory>
#include <string>

#include "capstan/nn/model.h"

namespace capstan::nn {

// Llama: RMSNorm before attention and before the gated MLP, RoPE, grouped-query attention, SwiGLU,
// tied or untied head.
[[nodiscard]] Model build_llama(const plan::ModelShape& shape, const ModelOptions& options,
                                const FindParam& find);
// Llama with experts in the place of every MLP.
[[nodiscard]] Model build_moe(const plan::ModelShape& shape, const ModelOptions& options,
                              const FindParam& find);

// Weights of one layer by their names.
struct LayerParams {
  const FindParam& find;
  std::string prefix;  // "model.layers.3."

  [[nodiscard]] Param weight(const std::string& name) const {
    return find(prefix + name + ".weight");
  }
  [[nodiscard]] Projection projection(const std::vector<std::string>& names,
                                      bool with_bias = false) const;
};

// A layer without its MLP.
struct DecoderLayer : Block {
  int index = 0;
  double eps = 0;
  AttentionInput attention;  // heads of the whole model; local numbers follow from the weights
  plan::RemadeParts remade;
  Param input_norm_D, post_norm_D;
  Projection qkv, o;

  DecoderLayer(const plan::ModelShape& shape, const ModelOptions& options, int index,
               const LayerParams& params);
  [[nodiscard]] BlockIO forward(const Context& context, Seams& seams,
                                const BlockIO& in) const override;
  [[nodiscard]] virtual Tensor mlp(const Context& context, Seams& seams,
                                   const Tensor& x_BTD) const = 0;

 private:
  [[nodiscard]] Tensor attend(const Context& context, Seams& seams, const Tensor& x_BTD) const;
  [[nodiscard]] AttentionInput local_attention() const;
};

// Embedding, layers and head; `layer` makes the layer of an index.
using LayerBuilder = std::function<std::unique_ptr<Block>(int index, const LayerParams& params)>;
[[nodiscard]] Model build_decoder(const plan::ModelShape& shape, const ModelOptions& options,
                                  const FindParam& find, const LayerBuilder& layer);

}  // namespace capstan::nn
