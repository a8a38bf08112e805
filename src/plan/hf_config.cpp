// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// config.json of Hugging Face models.
#include <fmt/format.h>

#include <optional>

#include "capstan/base/error.h"
#include "capstan/base/json.h"
#include "capstan/base/text.h"
#include "capstan/plan/family.h"

namespace capstan::plan {
namespace {

using json::Json;
using OrderedJson = nlohmann::ordered_json;

// A llama with a sliding window is what Hugging Face calls mistral, as long as it has no biases;
// with both it is neither, and the name below makes other readers refuse instead of computing
// something else.
struct HfNames {
  std::string type, architecture;
};
HfNames hf_names(const ModelShape& shape) {
  const FamilyDef& family = find_family(shape.family);
  if (!shape.sliding_window) return {family.hf_model_type, family.hf_architecture};
  if (!shape.attention_bias && shape.family == "llama") return {"mistral", "MistralForCausalLM"};
  return {"capstan_" + shape.family, "Capstan" + family.hf_architecture};
}

std::optional<std::string> family_of_hf_type(const std::string& type) {
  if (type == "mistral") return "llama";
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

}  // namespace

std::string to_hf_config(const ModelShape& shape, DType dtype) {
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
  if (shape.sliding_window) config["sliding_window"] = *shape.sliding_window;
  config["attention_bias"] = shape.attention_bias;
  config["attention_dropout"] = 0.0;
  config["mlp_bias"] = false;
  config["tie_word_embeddings"] = shape.tie_word_embeddings;
  config["initializer_range"] = shape.initializer_range;
  config["torch_dtype"] = torch_name(dtype);
  config["use_cache"] = true;
  return config.dump(2) + "\n";
}

ModelShape from_hf_config(const std::string& json_text, const std::string& origin) {
  const Json config = json::parse(json_text, origin);
  if (!config.is_object())
    throw DataError(ErrorText{.module = "plan",
                              .what = "reading the model config " + origin,
                              .got = std::string("a JSON ") + config.type_name(),
                              .need = "an object"});
  Reader reader(config, origin);
  const Json* type = reader.find("model_type");
  const std::string type_name = type && type->is_string() ? type->get<std::string>() : "";
  const std::optional<std::string> family = family_of_hf_type(type_name);
  if (!family) reader.complain("model_type: got " + (type ? quote(type->dump()) : "nothing"));
  ModelShape shape;
  shape.family = family.value_or("");
  shape.vocab_size = reader.size("vocab_size", std::nullopt);
  shape.hidden_size = reader.size("hidden_size", std::nullopt);
  shape.intermediate_size = reader.size("intermediate_size", std::nullopt);
  shape.num_hidden_layers = reader.size("num_hidden_layers", std::nullopt);
  shape.num_attention_heads = reader.size("num_attention_heads", std::nullopt);
  shape.num_key_value_heads = reader.size("num_key_value_heads", shape.num_attention_heads);
  if (!reader.find("head_dim") && shape.hidden_size % shape.num_attention_heads != 0)
    reader.complain(fmt::format("hidden_size {} does not divide by num_attention_heads {}",
                                shape.hidden_size, shape.num_attention_heads));
  shape.head_dim = reader.size("head_dim", shape.hidden_size / shape.num_attention_heads);
  shape.max_position_embeddings = reader.size("max_position_embeddings", 2048);
  shape.rms_norm_eps = reader.number(config, "rms_norm_eps", 1e-6);
  shape.rope_theta = read_rope(reader, config);
  if (type_name != "llama" &&
      reader.find("sliding_window"))  // llama files may carry the key; it has no effect there
    shape.sliding_window = reader.size("sliding_window", std::nullopt);
  shape.attention_bias = reader.boolean("attention_bias", false);
  shape.tie_word_embeddings = reader.boolean("tie_word_embeddings", false);
  shape.initializer_range = reader.number(config, "initializer_range", 0.02);
  if (shape.num_attention_heads % shape.num_key_value_heads != 0)
    reader.complain(fmt::format("num_attention_heads {} does not divide by num_key_value_heads {}",
                                shape.num_attention_heads, shape.num_key_value_heads));
  if (shape.head_dim % 2 != 0) reader.complain(fmt::format("head_dim {} is odd", shape.head_dim));
  reader.need_neutral("hidden_act", "silu");
  reader.need_neutral("attention_dropout", 0.0);
  reader.need_neutral("mlp_bias", false);
  reader.need_neutral("quantization_config", nullptr);
  reader.finish();
  return shape;
}

}  // namespace capstan::plan
