// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Thousands of damaged copies of config.json: each is a model, and then what is written of it reads
// back as the same, or it is refused, and nothing else happens.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <random>
#include <set>

#include "capstan/base/error.h"
#include "shapes.h"

namespace capstan::plan {
namespace {

using Json = nlohmann::json;

std::vector<Json> models() {
  std::vector<ModelShape> shapes(6, testing::llama3_8b_shape());
  shapes[1].attention_bias = true;
  shapes[2].qk_norm = true;
  shapes[3].sliding_window = 4096;
  shapes[4].family = "mixtral";
  shapes[5].family = "moe";
  for (const size_t i : {4U, 5U})
    shapes[i].experts = {.count = 8, .per_token = 2, .intermediate_size = 1024};
  std::vector<Json> configs;
  for (const ModelShape& shape : shapes)
    configs.push_back(Json::parse(to_hf_config(shape, DType::kBf16)));
  configs.push_back({{"model_type", "gpt2"},
                     {"n_embd", 768},
                     {"n_head", 12},
                     {"n_layer", 12},
                     {"vocab_size", 9}});
  configs.push_back({{"model_type", "qwen2_moe"},
                     {"vocab_size", 9},
                     {"hidden_size", 64},
                     {"intermediate_size", 64},
                     {"num_hidden_layers", 2},
                     {"num_attention_heads", 4},
                     {"num_experts", 4},
                     {"num_experts_per_tok", 2},
                     {"moe_intermediate_size", 32},
                     {"shared_expert_intermediate_size", 32}});
  return configs;
}

class Mutator {
 public:
  explicit Mutator(uint64_t seed) : random_(seed), models_(models()) {
    for (const Json& model : models_)
      for (const auto& [key, value] : model.items()) keys_.insert(key);
    for (const char* key : {"layer_types", "rope_parameters", "n_inner", "quantization_config",
                            "max_window_layers", "use_sliding_window"})
      keys_.insert(key);
  }
  Json next() {
    Json config = any_model();
    for (size_t times = below(5); times > 0; --times) change(config);
    return config;
  }

 private:
  size_t below(size_t limit) { return static_cast<size_t>(random_() % limit); }
  const Json& any_model() { return models_[below(models_.size())]; }

  void change(Json& config) {
    static const std::vector<Json> kValues = {nullptr,
                                              true,
                                              false,
                                              0,
                                              1,
                                              -1,
                                              2,
                                              8,
                                              1.5,
                                              -0.0,
                                              1e-320,
                                              1e300,
                                              "",
                                              "default",
                                              "gelu",
                                              INT64_MIN,
                                              INT64_MAX,
                                              UINT64_MAX,
                                              int64_t{1} << 62,
                                              1 << 30,
                                              Json::array(),
                                              Json::object(),
                                              Json(2, "full_attention"),
                                              {{"rope_type", 3}}};
    const std::string key =
        *std::next(keys_.begin(), static_cast<std::ptrdiff_t>(below(keys_.size())));
    if (below(4) == 0)
      config.erase(key);
    else if (const Json& other = any_model(); below(2) == 0 && other.contains(key))
      config[key] = other[key];
    else
      config[key] = kValues[below(kValues.size())];
  }

  std::mt19937_64 random_;
  std::vector<Json> models_;
  std::set<std::string> keys_;
};

TEST(HfConfigMutations, AreReadOrRefused) {
  Mutator mutator(5);
  int read = 0, refused = 0;
  for (int i = 0; i < 5000; ++i) {
    const std::string text = mutator.next().dump();
    try {
      const std::string again = to_hf_config(from_hf_config(text, "a"), DType::kBf16);
      ++read;
      EXPECT_EQ(to_hf_config(from_hf_config(again, "b"), DType::kBf16), again) << text;
    } catch (const DataError&) {
      ++refused;
    }
  }
  EXPECT_GT(read, 500);
  EXPECT_GT(refused, 500);
}

}  // namespace
}  // namespace capstan::plan
