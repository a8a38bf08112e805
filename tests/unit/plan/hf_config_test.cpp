// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <nlohmann/json.hpp>

#include "capstan/base/error.h"
#include "shapes.h"

namespace capstan::plan {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using Json = nlohmann::json;

void expect_equal(const ModelShape& a, const ModelShape& b) {
  EXPECT_EQ(a.family, b.family);
  EXPECT_EQ(a.vocab_size, b.vocab_size);
  EXPECT_EQ(a.hidden_size, b.hidden_size);
  EXPECT_EQ(a.intermediate_size, b.intermediate_size);
  EXPECT_EQ(a.num_hidden_layers, b.num_hidden_layers);
  EXPECT_EQ(a.num_attention_heads, b.num_attention_heads);
  EXPECT_EQ(a.num_key_value_heads, b.num_key_value_heads);
  EXPECT_EQ(a.head_dim, b.head_dim);
  EXPECT_EQ(a.max_position_embeddings, b.max_position_embeddings);
  EXPECT_EQ(a.hidden_act, b.hidden_act);
  EXPECT_EQ(a.rms_norm_eps, b.rms_norm_eps);
  EXPECT_EQ(a.rope_theta, b.rope_theta);
  EXPECT_EQ(a.sliding_window, b.sliding_window);
  EXPECT_EQ(a.attention_bias, b.attention_bias);
  EXPECT_EQ(a.attention_output_bias, b.attention_output_bias);
  EXPECT_EQ(a.qk_norm, b.qk_norm);
  EXPECT_EQ(a.tie_word_embeddings, b.tie_word_embeddings);
  EXPECT_EQ(a.initializer_range, b.initializer_range);
}

TEST(HfConfig, RoundTripsEveryField) {
  ModelShape shape = testing::llama3_8b_shape();
  shape.rms_norm_eps = 3.1e-6;
  shape.initializer_range = 0.0123;
  shape.head_dim = 96;
  expect_equal(from_hf_config(to_hf_config(shape, DType::kBf16), "config.json"), shape);
  shape.attention_bias = shape.attention_output_bias = true;
  shape.tie_word_embeddings = true;
  expect_equal(from_hf_config(to_hf_config(shape, DType::kFp32), "config.json"), shape);
  shape.sliding_window = 128;
  expect_equal(from_hf_config(to_hf_config(shape, DType::kFp32), "config.json"), shape);
}

// Every mixture of what Llama, Mistral, Qwen2 and Qwen3 have, by the name that computes it.
TEST(HfConfig, AttentionRoundTripsUnderTheNameThatComputesIt) {
  for (int bits = 0; bits < 16; ++bits) {
    ModelShape shape = testing::llama3_8b_shape();
    shape.attention_bias = (bits & 1) != 0;
    shape.attention_output_bias = (bits & 2) != 0;
    shape.qk_norm = (bits & 4) != 0;
    if ((bits & 8) != 0) shape.sliding_window = 4096;
    const Json config = Json::parse(to_hf_config(shape, DType::kBf16));
    static const std::map<int, std::string> types = {{0, "llama"},  {3, "llama"}, {8, "mistral"},
                                                     {1, "qwen2"},  {9, "qwen2"}, {4, "qwen3"},
                                                     {12, "qwen3"}, {7, "qwen3"}, {15, "qwen3"}};
    const auto type = types.find(bits);
    EXPECT_EQ(config["model_type"], type == types.end() ? "capstan_llama" : type->second) << bits;
    expect_equal(from_hf_config(config.dump(), "config.json"), shape);
  }
}

const char* const kQwen2 = R"({"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0,
    "bos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
    "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
    "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": true, "use_sliding_window": false,
    "vocab_size": 151936})";

// As Qwen2.5 0.5B is published: the window is not used.
TEST(HfConfig, Qwen2AsItIsPublished) {
  const ModelShape shape = from_hf_config(kQwen2, "config.json");
  EXPECT_EQ(shape.family, "llama");
  EXPECT_EQ(shape.head_dim, 64);
  EXPECT_EQ(shape.rope_theta, 1e6);
  EXPECT_TRUE(shape.attention_bias);
  EXPECT_FALSE(shape.attention_output_bias);
  EXPECT_FALSE(shape.qk_norm);
  EXPECT_FALSE(shape.sliding_window);
  EXPECT_TRUE(shape.tie_word_embeddings);
  const Json written = Json::parse(to_hf_config(shape, DType::kBf16));
  EXPECT_EQ(written["architectures"][0], "Qwen2ForCausalLM");
  EXPECT_EQ(written["use_sliding_window"], false);
  EXPECT_EQ(written["tie_word_embeddings"], true);
}

TEST(HfConfig, Qwen3HasHeadsOf128UnlessItSays) {
  Json config = Json::parse(kQwen2);
  config["model_type"] = "qwen3";
  config["num_attention_heads"] = 9;  // no divisor of the width
  config["num_key_value_heads"] = 3;
  const ModelShape shape = from_hf_config(config.dump(), "config.json");
  EXPECT_EQ(shape.head_dim, 128);
  EXPECT_TRUE(shape.qk_norm);
  EXPECT_FALSE(shape.attention_bias);
  config["attention_bias"] = true;
  EXPECT_TRUE(from_hf_config(config.dump(), "config.json").attention_output_bias);
}

TEST(HfConfig, QwenWindowsAreOfAllLayersOrNone) {
  Json config = Json::parse(kQwen2);
  const auto window = [&] { return from_hf_config(config.dump(), "c").sliding_window; };
  const auto refusal = [&] {
    try {
      return std::string(window() ? "a window" : "none");
    } catch (const DataError& e) {
      return std::string(e.what());
    }
  };
  config["use_sliding_window"] = true;
  EXPECT_FALSE(window());  // begins behind the last layer
  config["max_window_layers"] = 0;
  EXPECT_EQ(window(), 32768);
  for (const Json& some : {Json(20), Json(nullptr), Json("all")}) {
    config["max_window_layers"] = some;
    EXPECT_THAT(refusal(), HasSubstr("max_window_layers")) << some;
  }
  config["use_sliding_window"] = false;
  config["layer_types"] = Json(24, "full_attention");
  EXPECT_FALSE(window());
  config["layer_types"][3] = "sliding_attention";
  EXPECT_THAT(refusal(), HasSubstr("layer_types"));
  for (const Json& other : {Json(23, "full_attention"), Json(24, 1), Json("full_attention")}) {
    config["layer_types"] = other;
    EXPECT_THAT(refusal(), HasSubstr("layer_types")) << other;
  }
  config["num_hidden_layers"] = 1 << 30;  // as many names would not fit into memory
  EXPECT_THAT(refusal(), HasSubstr("need 1073741824 times"));
}

ModelShape gpt2_shape() {
  ModelShape shape;
  shape.family = "gpt2";
  shape.vocab_size = 50257;
  shape.hidden_size = 768;
  shape.intermediate_size = 3072;
  shape.num_hidden_layers = 12;
  shape.num_attention_heads = shape.num_key_value_heads = 12;
  shape.head_dim = 64;
  shape.max_position_embeddings = 1024;
  shape.hidden_act = "gelu_pytorch_tanh";
  shape.attention_bias = shape.attention_output_bias = shape.tie_word_embeddings = true;
  return shape;
}

TEST(HfConfig, Gpt2RoundTrips) {
  ModelShape shape = gpt2_shape();
  shape.initializer_range = 0.0123;
  shape.layer_norm_eps = 3.1e-6;
  shape.intermediate_size = 1000;
  for (const char* act : {"gelu", "gelu_pytorch_tanh"}) {
    shape.hidden_act = act;
    shape.tie_word_embeddings = !shape.tie_word_embeddings;
    const ModelShape back = from_hf_config(to_hf_config(shape, DType::kBf16), "config.json");
    expect_equal(back, shape);
    EXPECT_EQ(back.layer_norm_eps, shape.layer_norm_eps);
  }
  // Their matrices are transposed, so they must not read ours.
  EXPECT_EQ(Json::parse(to_hf_config(shape, DType::kBf16))["model_type"], "capstan_gpt2");
}

// As OpenAI's weights come: dropout is training's, gelu_new is gelu_pytorch_tanh.
TEST(HfConfig, Gpt2AsItIsPublished) {
  const char* const text =
      R"({"model_type": "gpt2", "activation_function": "gelu_new", "attn_pdrop": 0.1,
      "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "n_ctx": 1024, "n_embd": 768,
      "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257})";
  expect_equal(from_hf_config(text, "config.json"), gpt2_shape());
}

TEST(HfConfig, Gpt2OfAnotherKindIsRefused) {
  Json config = Json::parse(to_hf_config(gpt2_shape(), DType::kFp32));
  config["activation_function"] = "relu";
  config["scale_attn_by_inverse_layer_idx"] = true;
  config["add_cross_attention"] = true;
  try {
    (void)from_hf_config(config.dump(), "config.json");
    FAIL() << "no error";
  } catch (const DataError& error) {
    for (const char* word :
         {"activation_function", "relu", "scale_attn_by_inverse_layer_idx", "add_cross_attention"})
      EXPECT_THAT(error.what(), HasSubstr(word));
  }
}

// The default of n_inner, 4 n_embd, is beyond 64 bits.
TEST(HfConfig, Gpt2OfAnEndlessWidthIsRefused) {
  Json config = Json::parse(to_hf_config(gpt2_shape(), DType::kFp32));
  config.erase("n_inner");
  config["n_embd"] = int64_t{1} << 62;
  try {
    (void)from_hf_config(config.dump(), "config.json");
    FAIL() << "no error";
  } catch (const DataError& error) {
    EXPECT_THAT(error.what(), HasSubstr("hidden_size: got 4611686018427387904"));
    EXPECT_THAT(error.what(), Not(HasSubstr("got 0")));
  }
}

TEST(HfConfig, NamesTheArchitectureThatComputesTheSame) {
  ModelShape shape = testing::quickstart_shape();
  const auto config = [&] { return Json::parse(to_hf_config(shape, DType::kBf16)); };
  EXPECT_EQ(config()["model_type"], "llama");
  EXPECT_EQ(config()["architectures"][0], "LlamaForCausalLM");
  EXPECT_EQ(config()["torch_dtype"], "bfloat16");
  shape.sliding_window = 64;  // llama readers ignore a window, mistral readers honour it
  EXPECT_EQ(config()["model_type"], "mistral");
  EXPECT_EQ(config()["architectures"][0], "MistralForCausalLM");
  shape.attention_bias = shape.attention_output_bias = true;  // mistral has no biases
  EXPECT_EQ(config()["model_type"], "capstan_llama");
}

TEST(HfConfig, FamiliesWithoutAHuggingFaceTypeKeepTheirOwnName) {
  FamilyDef family = find_family("llama");
  family.name = "test_own";
  family.hf_model_type = "";
  family.hf_architecture = "OwnForCausalLM";
  register_family(family);
  ModelShape shape = testing::quickstart_shape();
  shape.family = "test_own";
  const std::string text = to_hf_config(shape, DType::kFp32);
  EXPECT_EQ(Json::parse(text)["model_type"], "capstan_test_own");
  EXPECT_EQ(Json::parse(text)["architectures"][0], "CapstanOwnForCausalLM");
  EXPECT_EQ(from_hf_config(text, "config.json").family, "test_own");
  EXPECT_THROW((void)from_hf_config(R"({"hidden_size": 8})", "config.json"), DataError);
}

TEST(HfConfig, MissingKeysTakeTheDefaultsOfTheFormat) {
  const ModelShape shape = from_hf_config(
      R"({"model_type":"llama","vocab_size":100,"hidden_size":64,"intermediate_size":96,
          "num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":null,"rope_scaling":null,
          "sliding_window":null,"rope_parameters":{"rope_type":"default","rope_theta":500000.0}})",
      "config.json");
  EXPECT_EQ(shape.num_key_value_heads, 4);
  EXPECT_EQ(shape.head_dim, 16);
  EXPECT_EQ(shape.max_position_embeddings, 2048);
  EXPECT_EQ(shape.rms_norm_eps, 1e-6);
  EXPECT_EQ(shape.rope_theta, 500000.0);
  EXPECT_FALSE(shape.tie_word_embeddings);
  EXPECT_FALSE(shape.sliding_window);
}

TEST(HfConfig, EverythingThatDoesNotFitIsListed) {
  Json config = Json::parse(to_hf_config(testing::quickstart_shape(), DType::kFp32));
  config["hidden_act"] = "gelu";
  config["mlp_bias"] = true;
  config["rope_scaling"] = {{"rope_type", "llama3"}, {"factor", 8.0}};
  config["vocab_size"] = "many";
  config["num_key_value_heads"] = 3;
  config["quantization_config"] = {{"bits", 4}};
  config.erase("hidden_size");
  try {
    (void)from_hf_config(config.dump(), "some/config.json");
    FAIL();
  } catch (const DataError& e) {
    for (const char* part :
         {"some/config.json", "hidden_act", "gelu", "mlp_bias", "rope_scaling.rope_type", "llama3",
          "vocab_size: got \"many\"", "num_key_value_heads 3", "quantization_config",
          "hidden_size is missing"})
      EXPECT_THAT(e.what(), HasSubstr(part));
  }
}

TEST(HfConfig, OtherContentIsRefused) {
  EXPECT_THROW((void)from_hf_config("[]", "c"), DataError);
  EXPECT_THROW((void)from_hf_config("{", "c"), DataError);
  EXPECT_THROW((void)from_hf_config(R"({"model_type":"gpt2"})", "c"), DataError);
  EXPECT_THROW((void)from_hf_config("{}", "c"), DataError);
  Json config = Json::parse(to_hf_config(testing::quickstart_shape(), DType::kFp32));
  for (const Json& bad : {Json(0), Json(-4), Json(1.5), Json(uint64_t{1} << 63), Json(true)}) {
    config["num_hidden_layers"] = bad;
    EXPECT_THROW((void)from_hf_config(config.dump(), "c"), DataError) << bad;
  }
}

}  // namespace
}  // namespace capstan::plan
