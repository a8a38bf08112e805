// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// config.json of Hugging Face models.
#include <fmt/format.h>

#include <algorithm>
#include <optional>

#include "capstan/base/error.h"
#include "capstan/base/json.h"
#include "capstan/base/text.h"
#include "capstan/plan/family.h"
#include "plan/gpt2_internal.h"

namespace capstan::plan {
namespace {

using json::Json;
using OrderedJson = nlohmann::ordered_json;

// What Hugging Face's Qwen2-MoE computes with experts in every layer.
bool is_qwen2_moe(const ModelShape& shape) {
  const ExpertShape& e = shape.experts;
  return e.router == "softmax" && e.groups == 1 && e.scaling == 1 && e.bias_update_rate == 0 &&
         e.shared_intermediate_size > 0 && e.shared_gate && !shape.attention_output_bias &&
         !shape.qk_norm && !shape.sliding_window;
}

// Whether the model type of the family computes the same.
bool is_family_type(const ModelShape& shape) {
  const bool has_bias = shape.attention_bias || shape.attention_output_bias;
  if (shape.family == "mixtral") return !has_bias && !shape.qk_norm;
  if (shape.family == "moe") return is_qwen2_moe(shape);
  return !shape.sliding_window && !shape.qk_norm &&
         shape.attention_bias == shape.attention_output_bias;
}

// A llama with norms of heads is what Hugging Face calls qwen3, with biases on q, k and v alone
// qwen2, with a sliding window mistral. Other mixtures are none of them: the name below makes other
// readers refuse instead of computing something else.
struct HfNames {
  std::string type, architecture;
};
HfNames hf_names(const ModelShape& shape) {
  const FamilyDef& family = find_family(shape.family);
  if (is_family_type(shape) && !family.hf_model_type.empty())
    return {family.hf_model_type, family.hf_architecture};
  if (shape.family == "llama") {
    const bool all_or_none = shape.attention_bias == shape.attention_output_bias;
    if (shape.qk_norm && all_or_none) return {"qwen3", "Qwen3ForCausalLM"};
    if (!shape.qk_norm && !all_or_none && shape.attention_bias)
      return {"qwen2", "Qwen2ForCausalLM"};
    if (!shape.qk_norm && all_or_none && !shape.attention_bias)
      return {"mistral", "MistralForCausalLM"};
  }
  return {"capstan_" + shape.family, "Capstan" + family.hf_architecture};
}
bool is_qwen(const std::string& type) { return type == "qwen2" || type == "qwen3"; }

std::optional<std::string> family_of_hf_type(const std::string& type) {
  if (type.empty()) return std::nullopt;  // families of users need not have one
  if (type == "mistral" || is_qwen(type)) return "llama";
  for (const std::string& name : family_names())
    if (find_family(name).hf_model_type == type || "capstan_" + name == type) return name;
  return std::nullopt;
}

std::string torch_name(DType dtype) {
  switch (dtype) {
    case DType::kFp64:
      return "float64";
    case DType::kFp32:
      return "float32";
    case DType::kFp16:
      return "float16";
    case DType::kBf16:
      return "bfloat16";
    default:
      return std::string(name_of(dtype));
  }
}

// Reads a config and collects what does not fit.
class Reader {
 public:
  Reader(const Json& config, std::string origin) : config_(config), origin_(std::move(origin)) {}

  // Null and a missing key are the same in these files.
  [[nodiscard]] const Json* find(const char* key) const {
    const auto it = config_.find(key);
    return it == config_.end() || it->is_null() ? nullptr : &*it;
  }
  int64_t size(const char* key, std::optional<int64_t> fallback) {
    constexpr int64_t kMost = int64_t{1} << 30;
    const Json* value = find(key);
    if (!value && fallback) return *fallback;
    if (!value) return complain(fmt::format("{} is missing", key)), 1;
    if (!value->is_number_integer() || *value < 1 || *value > kMost)
      return complain(fmt::format("{}: got {}, need a positive integer", key, value->dump())), 1;
    return value->get<int64_t>();
  }
  double number(const Json& object, const char* key, double fallback) {
    const auto it = object.find(key);
    if (it == object.end() || it->is_null()) return fallback;
    if (!it->is_number() || !(*it > 0))
      return complain(fmt::format("{}: got {}, need a positive number", key, it->dump())), fallback;
    return it->get<double>();
  }
  bool boolean(const char* key, bool fallback) {
    const Json* value = find(key);
    if (!value) return fallback;
    if (!value->is_boolean())
      return complain(fmt::format("{}: got {}, need true or false", key, value->dump())), fallback;
    return value->get<bool>();
  }
  // Keys whose only supported value is the neutral one.
  void need_neutral(const char* key, const Json& neutral) {
    const Json* value = find(key);
    if (value && *value != neutral)
      complain(fmt::format("{}: got {}, this build has {}", key, value->dump(), neutral.dump()));
  }
  void complain(std::string text) { problems_.push_back(std::move(text)); }
  void finish() const {
    if (problems_.empty()) return;
    throw DataError(ErrorText{
        .module = "plan",
        .what = "reading the model config " + origin_,
        .got = join(problems_, "; "),
        .need = "a model of a family of this build (" + join(family_names(), ", ") + ")"});
  }

 private:
  const Json& config_;
  std::string origin_;
  std::vector<std::string> problems_;
};

// rope_theta stands at the top, or, in newer files, inside rope_parameters.
double read_rope(Reader& reader, const Json& config) {
  double theta = reader.number(config, "rope_theta", 10000.0);
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    const Json* rope = reader.find(key);
    if (!rope) continue;
    if (!rope->is_object()) {
      reader.complain(fmt::format("{}: got {}, need an object", key, rope->dump()));
      continue;
    }
    theta = reader.number(*rope, "rope_theta", theta);
    for (const char* type_key : {"rope_type", "type"}) {
      const auto type = rope->find(type_key);
      if (type != rope->end() && *type != "default")
        reader.complain(
            fmt::format("{}.{}: got {}, this build has \"default\"", key, type_key, type->dump()));
    }
  }
  return theta;
}

// In the files of Qwen, layers from max_window_layers on have a window, if any has.
void read_qwen_window(Reader& reader, ModelShape& shape) {
  shape.sliding_window.reset();
  if (reader.boolean("use_sliding_window", false) && reader.find("sliding_window")) {
    const Json* first = reader.find("max_window_layers");
    if (first && *first == 0)
      shape.sliding_window = reader.size("sliding_window", std::nullopt);
    else if (!first || !first->is_number_integer() || *first < shape.num_hidden_layers)
      reader.complain(fmt::format(
          "max_window_layers: got {}, this build has 0 (every layer has the window), or {} or more "
          "(none has)",
          first ? first->dump() : "nothing", shape.num_hidden_layers));
  }
  const char* const kind = shape.sliding_window ? "sliding_attention" : "full_attention";
  const Json* types = reader.find("layer_types");
  const auto layers = static_cast<size_t>(shape.num_hidden_layers);
  if (types &&
      !(types->is_array() && types->size() == layers &&
        std::all_of(types->begin(), types->end(), [&](const Json& t) { return t == kind; })))
    reader.complain(fmt::format("layer_types: need {} times \"{}\", as the other keys say",
                                shape.num_hidden_layers, kind));
}

void read_attention(Reader& reader, const std::string& type, ModelShape& shape) {
  // Files of these may carry a window; it has no effect there.
  const bool has_no_window = type == "llama" || type == "qwen2_moe" || shape.family == "gpt2";
  if (is_qwen(type))
    read_qwen_window(reader, shape);
  else if (!has_no_window && reader.find("sliding_window"))
    shape.sliding_window = reader.size("sliding_window", std::nullopt);
  shape.qk_norm = type == "qwen3";
  if (type == "qwen2" || type == "qwen2_moe") {
    shape.attention_bias = type == "qwen2" || reader.boolean("qkv_bias", true);
    return;
  }
  shape.attention_bias = shape.attention_output_bias = reader.boolean("attention_bias", false);
  if (!type.starts_with("capstan_")) return;
  shape.attention_output_bias = reader.boolean("attention_output_bias", shape.attention_bias);
  shape.qk_norm = reader.boolean("qk_norm", false);
}

// Dropout is training's.
void read_gpt2(Reader& reader, const Json& config, ModelShape& shape) {
  shape.layer_norm_eps = reader.number(config, "layer_norm_eps", 1e-5);
  shape.attention_bias = shape.attention_output_bias = true;
  const Json* act = reader.find("hidden_act");
  if (*act == "gelu" || *act == "gelu_pytorch_tanh")
    shape.hidden_act = act->get<std::string>();
  else
    reader.complain(fmt::format(
        "activation_function: got {}, need gelu_new, gelu_pytorch_tanh or gelu", act->dump()));
  if (shape.num_key_value_heads != shape.num_attention_heads)
    reader.complain("num_key_value_heads: gpt2 has as many as n_head");
  if (shape.head_dim * shape.num_attention_heads != shape.hidden_size)
    reader.complain("head_dim: gpt2 has n_embd / n_head");
  reader.need_neutral("scale_attn_weights", true);
  reader.need_neutral("scale_attn_by_inverse_layer_idx", false);
  reader.need_neutral("reorder_and_upcast_attn", false);
  reader.need_neutral("add_cross_attention", false);
}

void write_attention(OrderedJson& config, const std::string& type, const ModelShape& shape) {
  if (shape.sliding_window) config["sliding_window"] = *shape.sliding_window;
  if (is_qwen(type)) {
    config["use_sliding_window"] = shape.sliding_window.has_value();
    config["max_window_layers"] = shape.sliding_window ? 0 : shape.num_hidden_layers;
  }
  config["attention_bias"] = shape.attention_bias;
  if (!type.starts_with("capstan_")) return;
  config["attention_output_bias"] = shape.attention_output_bias;
  config["qk_norm"] = shape.qk_norm;
}

// Settings of training (losses, balancing, capacity) are no part of a model: files carry the
// coefficient of the auxiliary loss for others to read, and it is not taken from them.
void write_experts(OrderedJson& config, const ModelShape& shape) {
  const ExpertShape& e = shape.experts;
  if (e.count == 0) return;
  config["num_experts_per_tok"] = e.per_token;
  config["output_router_logits"] = false;
  config["router_aux_loss_coef"] = e.auxiliary_loss;
  if (shape.family == "mixtral") {
    config["intermediate_size"] = e.intermediate_size;
    config["num_local_experts"] = e.count;
    config["router_jitter_noise"] = 0.0;
    return;
  }
  config["num_experts"] = e.count;
  config["moe_intermediate_size"] = e.intermediate_size;
  config["shared_expert_intermediate_size"] = e.shared_intermediate_size;
  config["norm_topk_prob"] = e.normalize_weights;
  config["decoder_sparse_step"] = 1;
  config["mlp_only_layers"] = OrderedJson::array();
  config["qkv_bias"] = shape.attention_bias;
  config["use_sliding_window"] = false;
  if (hf_names(shape).type == "qwen2_moe") return;
  config["capstan_shared_gate"] = e.shared_gate;
  config["capstan_router"] = e.router;
  config["n_group"] = e.groups;
  config["topk_group"] = e.groups_per_token;
  config["routed_scaling_factor"] = e.scaling;
  config["capstan_router_bias"] = e.bias_update_rate > 0;
}

void read_general_experts(Reader& reader, const Json& config, const std::string& type,
                          ExpertShape& e) {
  e.count = reader.size("num_experts", std::nullopt);
  e.per_token = reader.size("num_experts_per_tok", std::nullopt);
  e.intermediate_size = reader.size("moe_intermediate_size", std::nullopt);
  const Json* shared = reader.find("shared_expert_intermediate_size");
  const bool has_shared = shared && *shared != 0;
  if (has_shared) e.shared_intermediate_size = reader.size("shared_expert_intermediate_size", 1);
  e.normalize_weights = reader.boolean("norm_topk_prob", false);
  reader.need_neutral("decoder_sparse_step", 1);
  reader.need_neutral("mlp_only_layers", Json::array());
  reader.need_neutral("use_sliding_window", false);
  if (type == "qwen2_moe") {
    e.shared_gate = true;
    if (!has_shared) reader.complain("shared_expert_intermediate_size: need a positive integer");
    return;
  }
  e.shared_gate = reader.boolean("capstan_shared_gate", false);
  const Json* router = reader.find("capstan_router");
  if (router && *router != "softmax" && *router != "sigmoid")
    reader.complain(fmt::format("capstan_router: got {}, need softmax or sigmoid", router->dump()));
  else if (router)
    e.router = router->get<std::string>();
  e.groups = reader.size("n_group", 1);
  e.groups_per_token = reader.size("topk_group", 1);
  e.scaling = reader.number(config, "routed_scaling_factor", 1);
  reader.need_neutral("capstan_router_bias", false);
}

void read_experts(Reader& reader, const Json& config, const std::string& type, ModelShape& shape) {
  ExpertShape& e = shape.experts;
  if (shape.family == "mixtral") {
    e.count = reader.size("num_local_experts", 8);
    e.per_token = reader.size("num_experts_per_tok", 2);
    e.intermediate_size = shape.intermediate_size;
    reader.need_neutral("router_jitter_noise", 0.0);
  } else if (shape.family == "moe") {
    read_general_experts(reader, config, type, e);
  } else {
    return;
  }
  if (e.per_token > e.count)
    reader.complain(
        fmt::format("num_experts_per_tok {} is above the {} experts", e.per_token, e.count));
  if (e.count % e.groups != 0 || e.groups_per_token > e.groups ||
      e.count / e.groups * e.groups_per_token < e.per_token)
    reader.complain(fmt::format("{} of {} groups do not give {} of {} experts", e.groups_per_token,
                                e.groups, e.per_token, e.count));
}

}  // namespace

std::string to_hf_config(const ModelShape& shape, DType dtype) {
  if (shape.family == "gpt2") return to_gpt2_config(shape, torch_name(dtype));
  const HfNames names = hf_names(shape);
  OrderedJson config;
  config["architectures"] = {names.architecture};
  config["model_type"] = names.type;
  config["vocab_size"] = shape.vocab_size;
  config["hidden_size"] = shape.hidden_size;
  config["intermediate_size"] = shape.intermediate_size;
  config["num_hidden_layers"] = shape.num_hidden_layers;
  config["num_attention_heads"] = shape.num_attention_heads;
  config["num_key_value_heads"] = shape.num_key_value_heads;
  config["head_dim"] = shape.head_dim;
  config["max_position_embeddings"] = shape.max_position_embeddings;
  config["hidden_act"] = shape.hidden_act;
  config["rms_norm_eps"] = shape.rms_norm_eps;
  config["rope_theta"] = shape.rope_theta;
  config["rope_scaling"] = nullptr;
  write_attention(config, names.type, shape);
  config["attention_dropout"] = 0.0;
  config["mlp_bias"] = false;
  config["tie_word_embeddings"] = shape.tie_word_embeddings;
  config["initializer_range"] = shape.initializer_range;
  config["torch_dtype"] = torch_name(dtype);
  config["use_cache"] = true;
  write_experts(config, shape);
  return config.dump(2) + "\n";
}

ModelShape from_hf_config(const std::string& json_text, const std::string& origin) {
  const Json as_written = json::parse(json_text, origin);
  if (!as_written.is_object())
    throw DataError(ErrorText{.module = "plan",
                              .what = "reading the model config " + origin,
                              .got = std::string("a JSON ") + as_written.type_name(),
                              .need = "an object"});
  const auto type = as_written.find("model_type");
  const bool is_named = type != as_written.end() && type->is_string();
  const std::string type_name = is_named ? type->get<std::string>() : "";
  const std::optional<std::string> family = family_of_hf_type(type_name);
  const bool is_gpt2 = family == "gpt2";
  const Json config = is_gpt2 ? from_gpt2_keys(as_written) : as_written;
  Reader reader(config, origin);
  if (!family)
    reader.complain("model_type: got " +
                    (reader.find("model_type") ? quote(type->dump()) : "nothing"));
  ModelShape shape;
  shape.family = family.value_or("");
  shape.vocab_size = reader.size("vocab_size", std::nullopt);
  shape.hidden_size = reader.size("hidden_size", std::nullopt);
  shape.intermediate_size = reader.size("intermediate_size", std::nullopt);
  shape.num_hidden_layers = reader.size("num_hidden_layers", std::nullopt);
  shape.num_attention_heads = reader.size("num_attention_heads", std::nullopt);
  shape.num_key_value_heads = reader.size("num_key_value_heads", shape.num_attention_heads);
  if (!reader.find("head_dim") && type_name != "qwen3" &&
      shape.hidden_size % shape.num_attention_heads != 0)
    reader.complain(fmt::format("hidden_size {} does not divide by num_attention_heads {}",
                                shape.hidden_size, shape.num_attention_heads));
  const int64_t even_width = shape.hidden_size / shape.num_attention_heads;
  shape.head_dim = reader.size("head_dim", type_name == "qwen3" ? 128 : even_width);
  shape.max_position_embeddings = reader.size("max_position_embeddings", 2048);
  if (!is_gpt2) shape.rms_norm_eps = reader.number(config, "rms_norm_eps", 1e-6);
  shape.rope_theta = read_rope(reader, config);
  read_attention(reader, type_name, shape);
  shape.tie_word_embeddings = reader.boolean("tie_word_embeddings", false);
  shape.initializer_range = reader.number(config, "initializer_range", 0.02);
  if (shape.num_attention_heads % shape.num_key_value_heads != 0)
    reader.complain(fmt::format("num_attention_heads {} does not divide by num_key_value_heads {}",
                                shape.num_attention_heads, shape.num_key_value_heads));
  if (is_gpt2)
    read_gpt2(reader, config, shape);
  else if (shape.head_dim % 2 != 0)
    reader.complain(fmt::format("head_dim {} is odd", shape.head_dim));
  read_experts(reader, config, type_name, shape);
  if (!is_gpt2) reader.need_neutral("hidden_act", "silu");
  reader.need_neutral("attention_dropout", 0.0);
  reader.need_neutral("mlp_bias", false);
  reader.need_neutral("quantization_config", nullptr);
  reader.finish();
  return shape;
}

}  // namespace capstan::plan
