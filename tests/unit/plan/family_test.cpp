// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/plan/family.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "capstan/base/error.h"
#include "recipes.h"
#include "shapes.h"

namespace capstan::plan {
namespace {

using ::testing::HasSubstr;
using testing::index_of;
using testing::table_of;

TEST(Llama, ParameterCountsOfKnownModels) {
  // 8192*256 embedding; a layer: q 65,536 + k,v 2*32,768 + o 65,536 + 3*256*704 + 512; last norm
  // 256.
  EXPECT_EQ(count_parameters(table_of(testing::quickstart_shape())), 2'097'152 + 4 * 737'792 + 256);
  EXPECT_EQ(count_parameters(table_of(testing::llama3_8b_shape())), 8'030'261'248);
}

TEST(Llama, TableHasHuggingFaceNamesInOrder) {
  ModelShape shape = testing::quickstart_shape();
  shape.num_hidden_layers = 1;
  shape.tie_word_embeddings = false;
  std::vector<std::string> names;
  for (const ParamSpec& spec : table_of(shape)) names.push_back(spec.name);
  const std::vector<std::string> expected = {"model.embed_tokens.weight",
                                             "model.layers.0.input_layernorm.weight",
                                             "model.layers.0.self_attn.q_proj.weight",
                                             "model.layers.0.self_attn.k_proj.weight",
                                             "model.layers.0.self_attn.v_proj.weight",
                                             "model.layers.0.self_attn.o_proj.weight",
                                             "model.layers.0.post_attention_layernorm.weight",
                                             "model.layers.0.mlp.gate_proj.weight",
                                             "model.layers.0.mlp.up_proj.weight",
                                             "model.layers.0.mlp.down_proj.weight",
                                             "model.norm.weight",
                                             "lm_head.weight"};
  EXPECT_EQ(names, expected);
}

TEST(Llama, AttentionBiasAddsFourVectors) {
  ModelShape shape = testing::quickstart_shape();
  const int64_t without = count_parameters(table_of(shape));
  shape.attention_bias = shape.attention_output_bias = true;
  const auto table = table_of(shape);
  EXPECT_EQ(count_parameters(table) - without, 4 * (256 + 128 + 128 + 256));
  const ParamSpec& k =
      table[static_cast<size_t>(index_of(table, "model.layers.2.self_attn.k_proj.bias"))];
  EXPECT_EQ(k.shape, Shape{128});
  EXPECT_EQ(k.init.kind, Init::Kind::kZeros);
  EXPECT_FALSE(k.decay);
  EXPECT_EQ(k.site, Site::kSplit);
  EXPECT_EQ(k.tensor.units, 2);
  // A row projection adds its bias once, to the whole residual stream.
  const ParamSpec& o =
      table[static_cast<size_t>(index_of(table, "model.layers.2.self_attn.o_proj.bias"))];
  EXPECT_EQ(o.tensor.kind, ShardRule::Kind::kReplicate);
  EXPECT_EQ(o.site, Site::kResidual);
  EXPECT_EQ(o.fuse_group, -1);
}

// Qwen2 and Qwen3.
TEST(Llama, BiasesWithoutTheOutputAndNormsOfHeads) {
  ModelShape shape = testing::quickstart_shape();
  const int64_t without = count_parameters(table_of(shape));
  shape.attention_bias = true;
  EXPECT_EQ(count_parameters(table_of(shape)) - without, 4 * (256 + 128 + 128));
  shape.qk_norm = true;
  const auto table = table_of(shape);
  EXPECT_EQ(count_parameters(table) - without, 4 * (256 + 128 + 128 + 2 * 64));
  for (const char* name : {"q_norm", "k_norm"}) {
    const ParamSpec& norm = table[static_cast<size_t>(
        index_of(table, std::string("model.layers.3.self_attn.") + name + ".weight"))];
    EXPECT_EQ(norm.shape, Shape{64});
    EXPECT_EQ(norm.init.kind, Init::Kind::kOnes);
    EXPECT_FALSE(norm.decay);
    EXPECT_EQ(norm.tensor.kind, ShardRule::Kind::kReplicate);
    EXPECT_EQ(norm.site, Site::kSplit);
    EXPECT_EQ(norm.fuse_group, -1);
  }
}

TEST(Llama, SpecsSayHowToStartDecayAndCut) {
  ModelShape shape = testing::llama3_8b_shape();
  shape.initializer_range = 0.03;
  const auto table = table_of(shape);
  std::set<std::string> names;
  for (const ParamSpec& spec : table) {
    EXPECT_TRUE(names.insert(spec.name).second) << spec.name;
    const bool is_norm = spec.name.find("norm") != std::string::npos;
    EXPECT_EQ(spec.decay, !is_norm) << spec.name;
    EXPECT_EQ(spec.init.kind, is_norm ? Init::Kind::kOnes : Init::Kind::kNormal) << spec.name;
    EXPECT_EQ(spec.init.deviation, is_norm ? 0 : 0.03) << spec.name;
    EXPECT_EQ(spec.update, UpdateKind::kElementwise);
  }
  const auto at = [&](const std::string& name) {
    return table[static_cast<size_t>(index_of(table, name))];
  };
  const ParamSpec q = at("model.layers.31.self_attn.q_proj.weight"),
                  k = at("model.layers.31.self_attn.k_proj.weight"),
                  o = at("model.layers.31.self_attn.o_proj.weight"),
                  up = at("model.layers.31.mlp.up_proj.weight");
  EXPECT_EQ(q.block, 32);
  EXPECT_EQ(q.fuse_group, k.fuse_group);
  EXPECT_NE(q.fuse_group, up.fuse_group);
  EXPECT_EQ(o.fuse_group, -1);
  EXPECT_EQ(k.tensor.units, 8);
  EXPECT_EQ(q.tensor.dim, 0);
  EXPECT_EQ(o.tensor.dim, 1);
  EXPECT_EQ(at("lm_head.weight").tensor.kind, ShardRule::Kind::kVocab);
  EXPECT_EQ(at("lm_head.weight").block, 33);
  EXPECT_EQ(at("model.norm.weight").block, 33);
}

TEST(Llama, ForwardFlopsCountCausalAttentionExactly) {
  const ModelShape shape = testing::quickstart_shape();
  const ForwardFlops flops = find_family("llama").forward_flops(shape, 256);
  // Every multiply-add of the weights: 737,792 - 512 per layer.
  EXPECT_EQ(flops.linear, 2.0 * 4 * 737'280);
  // 4 layers x (scores + values) x 2 x 256 wide x mean of 1..256 keys.
  EXPECT_EQ(flops.attention, 4.0 * 2 * 2 * 256 * 128.5);
  EXPECT_EQ(flops.head, 2.0 * 256 * 8192);
  EXPECT_EQ(flops.total(), flops.linear + flops.attention + flops.head);
}

TEST(Llama, SlidingWindowCapsTheKeysSeen) {
  ModelShape shape = testing::quickstart_shape();
  const auto attention = [&](int64_t window, int64_t sequence) {
    shape.sliding_window = window;
    return find_family("llama").forward_flops(shape, sequence).attention;
  };
  const double per_key = 4.0 * 4 * 256;
  EXPECT_EQ(attention(1, 10), per_key);  // itself only
  EXPECT_DOUBLE_EQ(attention(4, 10), per_key * (1 + 2 + 3 + 7 * 4) / 10.0);
  EXPECT_EQ(attention(10, 10), per_key * 5.5);
  EXPECT_EQ(attention(1000, 10), per_key * 5.5);
}

TEST(Llama, ActivationSumsAreTheirTerms) {
  const ModelShape shape = testing::quickstart_shape();
  ActivationQuery query;
  query.tokens = 1024;
  query.samples = 4;
  query.sequence_length = 256;
  const ActivationBytes bytes = find_family("llama").activation_bytes(shape, query);
  int64_t layer = 0, head = 0, head_workspace = 0;
  for (const ActivationTerm& term : bytes.terms) {
    EXPECT_EQ(std::abs(term.bytes), allocation_bytes(std::abs(term.bytes)))
        << term.name;  // already rounded
    if (term.part == ActivationTerm::Part::kLayer) layer += term.bytes;
    if (term.part == ActivationTerm::Part::kHead) head += term.bytes;
    if (term.part == ActivationTerm::Part::kHeadWorkspace) head_workspace += term.bytes;
  }
  EXPECT_EQ(bytes.saved_per_layer, layer);
  EXPECT_EQ(bytes.saved_head, head);
  EXPECT_EQ(bytes.head_workspace, head_workspace);
  // The chunk of logits, 512 rows of the vocabulary in fp32, and the output of the last norm.
  EXPECT_EQ(head_workspace, 512 * 8192 * 4 + 1024 * shape.hidden_size * 4);
  EXPECT_GT(bytes.layer_workspace, 0);
  // A 16-bit pass keeps at least a third less, and an fp32 residual stream stays.
  query.compute = DType::kBf16;
  const ActivationBytes half = find_family("llama").activation_bytes(shape, query);
  EXPECT_LT(half.saved_per_layer, bytes.saved_per_layer * 2 / 3);
  EXPECT_GT(half.saved_per_layer, bytes.saved_per_layer / 2);
}

// What a part makes again is not kept by the layer, and is there while the part is differentiated.
TEST(Llama, SelectiveRecomputeMovesWhatAPartSaves) {
  const ModelShape shape = testing::quickstart_shape();
  ActivationQuery query;
  query.tokens = 4096;
  query.samples = 16;
  query.sequence_length = 256;
  const auto bytes_with = [&](RemadeParts remade) {
    query.remade = remade;
    return find_family("llama").activation_bytes(shape, query);
  };
  const auto of = [&](int64_t width) { return allocation_bytes(query.tokens * width * 4); };
  const int64_t hidden = of(shape.hidden_size), ffn = of(shape.intermediate_size),
                gate_up = of(2 * shape.intermediate_size);
  const int64_t heads = shape.num_attention_heads, keys = shape.num_key_value_heads;
  const int64_t attention =
      of((heads + 2 * keys) * shape.head_dim) + of(heads * shape.head_dim) + of(heads);
  const ActivationBytes all = bytes_with({});
  EXPECT_EQ(all.saved_per_layer - bytes_with({.norm = true}).saved_per_layer, 2 * hidden);
  EXPECT_EQ(all.saved_per_layer - bytes_with({.mlp = true}).saved_per_layer, gate_up + ffn);
  EXPECT_EQ(all.saved_per_layer - bytes_with({.attention = true}).saved_per_layer, attention);
  const ActivationBytes least = bytes_with({.attention = true, .mlp = true, .norm = true});
  EXPECT_EQ(least.saved_per_layer, 2 * hidden + 2 * of(1));
  EXPECT_GT(least.layer_workspace, all.layer_workspace);
  EXPECT_LE(least.layer_workspace, all.layer_workspace + gate_up + ffn + hidden);
  EXPECT_EQ(least.block_input, all.block_input);
}

TEST(Allocation, SizesRoundToEightClassesPerDoubling) {
  EXPECT_EQ(allocation_bytes(0), 0);
  EXPECT_EQ(allocation_bytes(1), 64);
  EXPECT_EQ(allocation_bytes(512), 512);
  EXPECT_EQ(allocation_bytes(513), 576);
  EXPECT_EQ(allocation_bytes(1024), 1024);
  EXPECT_EQ(allocation_bytes(1025), 1152);
  EXPECT_EQ(allocation_bytes((1 << 20) + 1), (1 << 20) + (1 << 17));
}

TEST(Head, ChunkFollowsTheVocabulary) {
  EXPECT_EQ(head_chunk_tokens(8192, 4096), 512);
  EXPECT_EQ(head_chunk_tokens(50304, 4096), 256);
  EXPECT_EQ(head_chunk_tokens(128256, 4096), 256);
  EXPECT_EQ(head_chunk_tokens(100, 4096), 1024);
  EXPECT_EQ(head_chunk_tokens(8192, 100), 100);
  EXPECT_EQ(head_chunk_tokens(8192, 0), 1);
}

TEST(Families, UnknownNameIsRefusedWithTheList) {
  try {
    (void)find_family("lama");
    FAIL();
  } catch (const ConfigError& e) {
    EXPECT_THAT(e.what(), HasSubstr("'lama'"));
    EXPECT_THAT(e.what(), HasSubstr("Did you mean 'llama'"));
  }
}

TEST(Families, UsersAddAndReplace) {
  FamilyDef family = find_family("llama");
  family.name = "test_family";
  family.hf_model_type = "test_a";
  register_family(family);
  const FamilyDef& first = find_family("test_family");
  family.hf_model_type = "test_b";
  register_family(family);
  EXPECT_EQ(find_family("test_family").hf_model_type, "test_b");
  EXPECT_EQ(first.hf_model_type, "test_a");  // references stay valid
  const auto names = family_names();
  EXPECT_EQ(std::count(names.begin(), names.end(), "test_family"), 1);
  EXPECT_THROW(register_family(FamilyDef{}), InternalError);
}

// A family of a user: llama with one more matrix, which the tensor axis cuts along its rows.
FamilyDef family_with(const std::string& name, const ParamSpec& more) {
  FamilyDef family = find_family("llama");
  family.name = name;
  family.hf_model_type = "";
  family.param_table = [more](const ModelShape& shape) {
    auto table = find_family("llama").param_table(shape);
    table.push_back(more);
    return table;
  };
  return family;
}

ParamSpec extra_matrix(int64_t rows) {
  ParamSpec spec;
  spec.name = "model.layers.0.extra.weight";
  spec.shape = {rows, 256};
  spec.block = 1;
  spec.site = Site::kSplit;
  spec.tensor = {ShardRule::Kind::kSplit, 0};
  return spec;
}

std::string refusal_of(const std::vector<std::string>& overrides, int ranks) {
  try {
    (void)testing::plan_of(testing::resolved(overrides), testing::machine(ranks));
  } catch (const recipe::RecipeError& e) {
    return e.what();
  }
  return "";
}

TEST(Families, OwnOnesAreLegalInRecipesAndCutAsTheirTableSays) {
  const std::string key = "model.family=test_rows", tensor = "parallel.tensor=4";
  EXPECT_THAT(refusal_of({key}, 1), HasSubstr("model.family: got 'test_rows'"));
  register_family(family_with("test_rows", extra_matrix(6)));
  EXPECT_EQ(refusal_of({key, "parallel.tensor=2"}, 2), "");
  const std::string text = refusal_of({key, tensor}, 4);
  for (const char* words : {"parallel.tensor: got 4, need a divisor of 6, dimension 0 of "
                            "model.layers.0.extra.weight",
                            "Nearest: parallel.tensor 3 or 6"})
    EXPECT_THAT(text, HasSubstr(words));
}

// Recompute that a family does not know must not look as if it were done.
TEST(Families, SelectiveRecomputeNeedsPartsThatRunAgain) {
  FamilyDef whole = find_family("llama");
  whole.name = "test_whole_layers";
  whole.forward_flops = [](const ModelShape&, int64_t) { return ForwardFlops{.linear = 1}; };
  register_family(whole);
  const std::vector<std::string> parts = {"parallel.recompute.mode=selective",
                                          "parallel.recompute.parts=[mlp, norm]"};
  EXPECT_EQ(refusal_of(parts, 1), "");
  EXPECT_EQ(refusal_of({"model.family=test_whole_layers", "parallel.recompute.mode=block"}, 1), "");
  EXPECT_THAT(refusal_of({"model.family=test_whole_layers", parts[0], parts[1]}, 1),
              HasSubstr("parallel.recompute.mode: got selective, need none or block (layers of "
                        "model.family test_whole_layers have no parts that run again)"));
}

TEST(Families, ExpertsFollowTheTable) {
  ParamSpec expert = extra_matrix(8);
  expert.tensor = {};
  expert.expert = 0;
  expert.num_experts = 1;
  register_family(family_with("test_dense", extra_matrix(8)));
  register_family(family_with("test_experts", expert));
  EXPECT_THAT(refusal_of({"model.family=test_dense", "model.experts.count=4"}, 1),
              HasSubstr("model.experts.count: got 4, need 0 (model.family test_dense has no"));
  EXPECT_THAT(refusal_of({"model.family=test_experts"}, 1),
              HasSubstr("model.experts.count: got 0, need at least 1"));
  EXPECT_EQ(
      refusal_of(
          {"model.family=test_experts", "model.experts.count=1", "model.experts.per_token=1"}, 1),
      "");
}

// What travels over the tensor axis follows from the table, for any family.
TEST(Families, TrafficOverTensorCountsTheCutsOfTheTable) {
  register_family(family_with("test_traffic", extra_matrix(8)));
  const auto sums = [](const std::string& family) {
    const Plan plan = testing::plan_of(
        testing::resolved({"model.family=" + family, "parallel.tensor=2"}), testing::machine(2));
    return predict_traffic(plan, 0).at("tp/all_reduce").calls;
  };
  EXPECT_EQ(sums("test_traffic") - sums("llama"), 2);  // one more backward in each micro-batch
}

}  // namespace
}  // namespace capstan::plan
