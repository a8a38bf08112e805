// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "ranks/equivalence/layout_case.h"

#include <algorithm>
#include <set>

#include "capstan/base/error.h"
#include "capstan/recipe/load.h"

namespace capstan::test {
namespace {

constexpr const char* kRecipe = R"(version: 1
run: {name: layouts, steps: 50}
model:
  vocab_size: 61
  hidden_size: 32
  intermediate_size: 48
  num_hidden_layers: 4
  num_attention_heads: 4
  num_key_value_heads: 2
  initializer_range: 0.15
data:
  tokenizer: data/tok
  train:
    - {path: data/train}
batch: {global_samples: 8, micro_samples: 1, sequence_length: 32}
optimizer: {lr: 1.0e-2}
lr_schedule: {warmup: 2}
)";

// Which recipe key an axis sets; the rest is set by hand.
const std::map<std::string, std::string>& keys() {
  static const std::map<std::string, std::string> table = {
      {"family", "model.family"},
      {"ep", "parallel.expert"},
      {"tied", "model.tie_word_embeddings"},
      {"kv", "model.num_key_value_heads"},
      {"window", "model.sliding_window"},
      {"documents", "data.documents"},
      {"length", "batch.sequence_length"},
      {"tp", "parallel.tensor"},
      {"sp", "parallel.sequence"},
      {"sp_overlap", "parallel.sequence_overlap"},
      {"pp", "parallel.pipeline.size"},
      {"schedule", "parallel.pipeline.schedule"},
      {"chunks", "parallel.pipeline.chunks"},
      {"cp", "parallel.context.size"},
      {"method", "parallel.context.method"},
      {"zero", "parallel.zero.stage"},
      {"reduce", "parallel.zero.reduce"},
      {"reshard", "parallel.zero.reshard_after_forward"},
      {"offload", "parallel.zero.offload"},
      {"activations", "parallel.offload_activations"},
      {"micro", "batch.micro_samples"},
      {"optimizer", "optimizer.name"},
  };
  return table;
}

std::vector<LayoutAxis> all_axes() {
  std::vector<LayoutAxis> axes = model_axes();
  axes.insert(axes.end(), layout_axes().begin(), layout_axes().end());
  return axes;
}

std::string draw_value(std::mt19937_64& random, const LayoutAxis& axis) {
  return axis.values[random() % axis.values.size()];
}

LayoutCase draw_once(std::mt19937_64& random, const Fixed& fixed) {
  LayoutCase drawn;
  for (const LayoutAxis& axis : all_axes()) drawn.values[axis.name] = draw_value(random, axis);
  // Seldom, so that most cases share their one-rank run with others.
  for (const auto& [axis, usual] :
       {std::pair{"length", "32"}, {"frozen", "none"}, {"optimizer", "adamw"}, {"qwen", "none"}})
    if (random() % 3 > 0) drawn.values[axis] = usual;
  for (const auto& [axis, value] : fixed) drawn.values[axis] = value;
  // Most free draws contradict themselves; what only follows from another axis is set right, unless
  // it is asked for.
  const auto is_fixed = [&](const std::string& axis) {
    return std::any_of(fixed.begin(), fixed.end(), [&](const auto& f) { return f.first == axis; });
  };
  const auto settle = [&](bool contradicts, const char* axis, const char* value) {
    if (contradicts && !is_fixed(axis)) drawn.values[axis] = value;
  };
  auto& v = drawn.values;
  settle(v["tp"] == "1", "sp", "false");
  settle(v["sp"] == "false", "sp_overlap", "false");
  settle(v["family"] != "moe", "ep", "1");
  settle(v["family"] != "moe", "router", "softmax");
  settle(v["family"] == "gpt2", "kv", "4");
  settle(v["family"] == "gpt2", "qwen", "none");
  settle(v["family"] == "gpt2", "window", "none");
  settle(v["schedule"] == "gpipe" || v["schedule"] == "1f1b", "chunks", "1");
  settle(v["schedule"] == "interleaved" && v["chunks"] == "1", "chunks", "2");
  settle(v["schedule"] == "zero_bubble" && v["chunks"] == "3", "chunks", "2");
  settle(v["zero"] == "0", "dp_shard", "1");
  settle(v["zero"] == "0" || v["zero"] == "1", "reduce", "step");
  settle(v["zero"] != "3", "reshard", "true");
  settle(v["zero"] != "3" && v["offload"] == "all", "offload", "optimizer");
  return drawn;
}

std::vector<Pair> pairs_of(const LayoutCase& layout) {
  std::vector<Pair> pairs;
  for (auto a = layout.values.begin(); a != layout.values.end(); ++a)
    for (auto b = std::next(a); b != layout.values.end(); ++b) pairs.push_back({*a, *b});
  return pairs;
}

}  // namespace

const std::vector<LayoutAxis>& model_axes() {
  static const std::vector<LayoutAxis> axes = {
      {"family", {"llama", "moe", "gpt2"}},
      {"router", {"softmax", "sigmoid"}},
      {"tied", {"false", "true"}},
      {"kv", {"2", "4", "1"}},
      {"documents", {"joined", "separate"}},
      {"window", {"none", "9"}},
      {"length", {"32", "12"}},
      {"frozen", {"none", "embedding", "attention", "most"}},
      {"optimizer", {"adamw", "lion", "sophia"}},
      {"qwen", {"none", "2", "3"}}};
  return axes;
}

const std::vector<LayoutAxis>& layout_axes() {
  static const std::vector<LayoutAxis> axes = {
      {"tp", {"1", "2", "4"}},
      {"sp", {"false", "true"}},
      {"sp_overlap", {"false", "true"}},
      {"pp", {"1", "2", "3", "4"}},
      {"schedule", {"gpipe", "1f1b", "interleaved", "zero_bubble"}},
      {"chunks", {"1", "2", "3"}},
      {"cp", {"1", "2", "4"}},
      {"method", {"ring", "all_to_all"}},
      {"ep", {"1", "2", "4"}},
      {"dp_replicate", {"1", "2", "4"}},
      {"dp_shard", {"1", "2", "4"}},
      {"zero", {"0", "1", "2", "3"}},
      {"reduce", {"step", "micro_batch"}},
      {"reshard", {"true", "false"}},
      {"offload", {"none", "optimizer", "all"}},
      {"recompute", {"none", "block", "attention", "mlp", "norm", "attention,mlp,norm"}},
      {"activations", {"false", "true"}},
      {"kept", {"none", "norms", "matrices"}},
      {"micro", {"1", "2"}},
  };
  return axes;
}

int LayoutCase::ranks() const {
  return number("tp") * number("pp") * number("cp") * number("dp_replicate") * number("dp_shard");
}

std::vector<std::string> LayoutCase::overrides() const {
  std::vector<std::string> list;
  for (const auto& [axis, key] : keys()) list.push_back(key + "=" + values.at(axis));
  const int data = number("dp_replicate") * number("dp_shard");
  list.push_back("parallel.data=" + std::to_string(data));
  list.push_back("precision.compute=" + compute);
  list.push_back("optimizer.moments=" + moments);
  const std::string& recompute = values.at("recompute");
  const bool is_mode = recompute == "none" || recompute == "block";
  list.push_back("parallel.recompute.mode=" + (is_mode ? recompute : "selective"));
  if (!is_mode) list.push_back("parallel.recompute.parts=[" + recompute + "]");
  if (values.at("family") == "moe")
    for (const char* expert :
         {"model.experts.count=8", "model.experts.per_token=2", "model.intermediate_size=16",
          "model.experts.shared_intermediate_size=16", "model.experts.auxiliary_loss=0.02",
          "model.experts.z_loss=1.0e-3"})
      list.push_back(expert);
  // The router whose choice depends on what earlier steps counted.
  if (values.at("router") == "sigmoid")
    for (const char* key : {"model.experts.router=sigmoid", "model.experts.bias_update_rate=0.01",
                            "model.experts.auxiliary_scope=global"})
      list.push_back(key);
  if (values.at("qwen") == "2")
    for (const char* key : {"model.attention_bias=true", "model.attention_output_bias=false"})
      list.push_back(key);
  if (values.at("qwen") == "3") list.push_back("model.qk_norm=true");
  // A pass for the curvature in every step but the first, and a rho that leaves most quotients
  // behind it unclipped.
  if (values.at("optimizer") == "sophia")
    for (const char* key :
         {"optimizer.betas=[0.9, 0.9]", "optimizer.sophia.interval=1", "optimizer.sophia.rho=3"})
      list.push_back(key);
  const bool is_gpt2 = values.at("family") == "gpt2";
  // `most` leaves an MLP whose input needs no gradient, and single norms.
  static const std::map<std::string, std::string> frozen = {
      {"none", "[]"},
      {"embedding", "['model.embed_tokens.*']"},
      {"attention", "['model.layers.1.self_attn.*']"},
      {"most", "['*', '!model.layers.2.mlp.*', '!*.3.input_layernorm.weight', '!model.norm.*']"}};
  static const std::map<std::string, std::string> gpt2_frozen = {
      {"none", "[]"},
      {"embedding", "['transformer.wte.*']"},
      {"attention", "['transformer.h.1.attn.*']"},
      {"most", "['*', '!transformer.h.2.mlp.*', '!*.3.ln_1.weight', '!transformer.ln_f.*']"}};
  std::string patterns = (is_gpt2 ? gpt2_frozen : frozen).at(values.at("frozen"));
  // Of the gradient of gpt2's key biases rounding is all there is (a number added to all scores of
  // a query changes nothing): Adam would scale it up, Lion and Sophia take its sign.
  if (is_gpt2 && values.at("optimizer") == "adamw") list.push_back("optimizer.eps=1.0e-6");
  if (is_gpt2 && values.at("optimizer") != "adamw") {
    patterns.pop_back();
    for (const char* part : {"q", "k", "v"})  // one product reads all three
      patterns += std::string(patterns == "[" ? "" : ", ") + "'*." + part + "_proj.bias'";
    patterns += "]";
  }
  list.push_back("model.frozen=" + patterns);
  // In fp64 this splits the flat buffers and nothing else.
  static const std::map<std::string, std::string> kept = {
      {"none", "[]"}, {"norms", "['*norm*']"}, {"matrices", "['*mlp*', '*.1.self_attn.*']"}};
  static const std::map<std::string, std::string> gpt2_kept = {
      {"none", "[]"}, {"norms", "['*.ln_*']"}, {"matrices", "['*mlp*', '*.1.attn.*']"}};
  list.push_back("precision.keep_fp32=" + (is_gpt2 ? gpt2_kept : kept).at(values.at("kept")));
  if (compute != "fp64")
    list.push_back("optimizer.lr=1.0e-3");  // else noise grows from step to step
  if (values.at("zero") != "0") list.push_back("parallel.zero.shard_size=" + values.at("dp_shard"));
  return list;
}

std::string LayoutCase::describe() const {
  std::string text;
  for (const LayoutAxis& axis : all_axes()) {
    const std::string& value = values.at(axis.name);
    if (value != axis.values.front()) text += (text.empty() ? "" : " ") + axis.name + "=" + value;
  }
  return text.empty() ? "one rank" : text;
}

std::string LayoutCase::model_key() const {
  std::string key;
  for (const LayoutAxis& axis : model_axes()) key += axis.name + "=" + values.at(axis.name) + " ";
  return key;
}

LayoutCase LayoutCase::one_rank() const {
  LayoutCase one = *this;
  for (const LayoutAxis& axis : layout_axes()) one.values[axis.name] = axis.values.front();
  one.values["micro"] = "2";
  return one;
}

int LayoutCase::wide_axes() const {
  int count = 0;
  for (const char* axis : {"tp", "pp", "cp", "dp_replicate", "dp_shard"}) count += number(axis) > 1;
  return count;
}

plan::Plan make_case_plan(const LayoutCase& layout) {
  if (layout.values.at("zero") == "0" && layout.number("dp_shard") > 1)
    throw ConfigError(ErrorText{.module = "test", .what = "shards without ZeRO"});
  plan::Topology topology;
  topology.world_size = topology.local_size = layout.ranks();
  topology.physical_cores = 2;
  const auto recipe = recipe::parse_recipe(kRecipe, "layouts.yaml", layout.overrides());
  return plan::make_plan(recipe, topology, {.tokenizer_vocab_size = 61});
}

std::optional<LayoutCase> draw_case(std::mt19937_64& random, const Fixed& fixed, int tries,
                                    int most_ranks) {
  for (int i = 0; i < tries; ++i) {
    const LayoutCase drawn = draw_once(random, fixed);
    if (drawn.ranks() < 2 || drawn.ranks() > most_ranks) continue;
    try {
      (void)make_case_plan(drawn);
      return drawn;
    } catch (const ConfigError&) {
    }
  }
  return std::nullopt;
}

std::vector<LayoutCase> draw_cases(uint64_t seed, int count, std::vector<Pair>* pairs) {
  std::mt19937_64 random(seed);
  std::vector<LayoutCase> cases;
  std::set<Pair> covered;
  const auto add = [&](LayoutCase drawn) {
    for (Pair& pair : pairs_of(drawn)) covered.insert(std::move(pair));
    cases.push_back(std::move(drawn));
  };
  const auto axes = all_axes();
  for (size_t a = 0; a < axes.size(); ++a)
    for (size_t b = a + 1; b < axes.size(); ++b)
      for (const std::string& va : axes[a].values)
        for (const std::string& vb : axes[b].values) {
          const bool sorted = axes[a].name < axes[b].name;
          const Pair pair = sorted ? Pair{{axes[a].name, va}, {axes[b].name, vb}}
                                   : Pair{{axes[b].name, vb}, {axes[a].name, va}};
          if (covered.contains(pair)) continue;
          const Fixed fixed{{axes[a].name, va}, {axes[b].name, vb}};
          if (auto drawn = draw_case(random, fixed, 60)) add(std::move(*drawn));
        }
  while (static_cast<int>(cases.size()) < count)
    if (auto drawn = draw_case(random, {}, 1000)) add(std::move(*drawn));
  if (pairs) pairs->assign(covered.begin(), covered.end());
  return cases;
}

}  // namespace capstan::test
