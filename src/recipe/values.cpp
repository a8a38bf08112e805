// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/recipe/values.h"

#include <algorithm>

#include "capstan/base/check.h"

namespace capstan::recipe {
namespace {

std::vector<ChoiceKey>& table_of_choices() {
  static std::vector<ChoiceKey> table = {
      {"run.device", {"auto", "cpu", "cuda"}, {}},
      {"run.gemm", {"auto", "libtorch", "cublaslt"}, {}},
      {"model.family", {"llama", "mixtral", "moe", "gpt2"}, {}},
      {"model.experts.router", {"softmax", "sigmoid"}, {}},
      {"model.experts.auxiliary_scope", {"sequence", "global"}, {}},
      {"model.hidden_act", {"silu", "gelu", "gelu_pytorch_tanh"}, {}},
      {"model.rope_scaling.rope_type", {"default"}, {"llama3", "linear", "dynamic", "yarn"}},
      {"data.documents", {"joined", "separate"}, {}},
      {"optimizer.name", {"adamw", "lion", "sophia"}, {"muon"}},
      {"optimizer.moments", {"auto", "bf16", "int8"}, {}},
      {"lr_schedule.kind", {"constant", "linear", "cosine", "wsd", "inverse_sqrt"}, {}},
      {"lr_schedule.unit", {"steps", "tokens"}, {}},
      {"precision.compute", {"auto", "bf16", "fp32", "fp16", "fp64"}, {}},
      {"precision.residual", {"auto", "bf16", "fp32", "fp16", "fp64"}, {}},
      {"precision.master", {"fp32", "fp64"}, {}},
      {"precision.gradients", {"fp32", "fp64"}, {}},
      {"precision.reduction", {"auto", "bf16", "fp16", "fp32", "fp64"}, {}},
      {"precision.fp8.scaling", {"none", "tensor", "row", "delayed"}, {}},
      {"precision.fp8.gradients", {"e5m2", "e4m3"}, {}},
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

ChoiceKey* find(std::string_view key) {
  auto& table = table_of_choices();
  const auto found =
      std::find_if(table.begin(), table.end(), [&](const ChoiceKey& c) { return c.key == key; });
  return found == table.end() ? nullptr : &*found;
}

}  // namespace

const std::vector<ChoiceKey>& choice_keys() { return table_of_choices(); }

const ChoiceKey* find_choice_key(std::string_view key) { return find(key); }

void add_choice(std::string_view key, const std::string& value) {
  ChoiceKey* choice = find(key);
  CAPSTAN_CHECK(choice, "{} is no key with choices", key);
  auto& values = choice->available;
  if (std::find(values.begin(), values.end(), value) == values.end()) values.push_back(value);
}

}  // namespace capstan::recipe
