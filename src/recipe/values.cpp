// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/recipe/values.h"

namespace capstan::recipe {

const std::vector<ChoiceKey>& choice_keys() {
  static const std::vector<ChoiceKey> table = {
      {"run.device", {"auto", "cpu"}, {"cuda"}},
      {"model.family", {"llama", "mixtral", "moe"}, {"qwen2", "mistral", "gpt2"}},
      {"model.experts.router", {"softmax", "sigmoid"}, {}},
      {"model.experts.auxiliary_scope", {"sequence", "global"}, {}},
      {"model.hidden_act", {"silu"}, {"gelu", "gelu_pytorch_tanh"}},
      {"model.rope_scaling.rope_type", {"default"}, {"llama3", "linear", "dynamic", "yarn"}},
      {"data.documents", {"joined", "separate"}, {}},
      {"optimizer.name", {"adamw"}, {"lion", "sophia", "muon"}},
      {"lr_schedule.kind", {"constant", "linear", "cosine", "wsd", "inverse_sqrt"}, {}},
      {"lr_schedule.unit", {"steps", "tokens"}, {}},
      {"precision.compute", {"auto", "bf16", "fp32", "fp16", "fp64"}, {}},
      {"precision.residual", {"auto", "bf16", "fp32", "fp16", "fp64"}, {}},
      {"precision.master", {"fp32", "fp64"}, {}},
      {"precision.gradients", {"fp32", "fp64"}, {}},
      {"parallel.pipeline.schedule", {"gpipe", "1f1b", "interleaved", "zero_bubble"}, {}},
      {"parallel.context.method", {"ring", "all_to_all"}, {}},
      {"parallel.zero.reduce", {"auto", "step", "micro_batch"}, {}},
      {"parallel.zero.offload", {"none", "optimizer", "all"}, {}},
      {"parallel.recompute.mode", {"none", "block", "selective"}, {}},
      {"parallel.recompute.parts", {"attention", "mlp", "norm"}, {}},
      {"checkpoint.verify", {"full", "fast"}, {}},
  };
  return table;
}

const ChoiceKey* find_choice_key(std::string_view key) {
  for (const ChoiceKey& choice : choice_keys()) {
    if (choice.key == key) return &choice;
  }
  return nullptr;
}

}  // namespace capstan::recipe
