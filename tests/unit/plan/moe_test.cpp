// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Families with experts: table, counts, FLOPs, activations, names in files, exchanges, layout.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "capstan/base/error.h"
#include "capstan/plan/experts.h"
#include "capstan/plan/layout.h"
#include "recipes.h"
#include "shapes.h"

namespace capstan::plan {
namespace {

using ::testing::HasSubstr;
using testing::index_of;
using testing::table_of;
using Json = nlohmann::json;

ModelShape mixtral_8x7b() {
  ModelShape s = testing::llama3_8b_shape();
  s.family = "mixtral";
  s.vocab_size = 32000;
  s.max_position_embeddings = 32768;
  s.rope_theta = 1e6;
  s.experts = {.count = 8, .per_token = 2, .intermediate_size = 14336};
  return s;
}

// Qwen1.5-MoE-A2.7B without its attention biases.
ModelShape qwen_moe() {
  ModelShape s;
  s.family = "moe";
  s.vocab_size = 151936;
  s.hidden_size = 2048;
  s.intermediate_size = 5632;
  s.num_hidden_layers = 24;
  s.num_attention_heads = s.num_key_value_heads = 16;
  s.head_dim = 128;
  s.max_position_embeddings = 8192;
  s.experts = {.count = 60,
               .per_token = 4,
               .intermediate_size = 1408,
               .shared_intermediate_size = 5632,
               .shared_gate = true,
               .normalize_weights = false};
  return s;
}

const ParamSpec& spec_of(const std::vector<ParamSpec>& table, const std::string& name) {
  const int index = index_of(table, name);
  if (index < 0) throw std::runtime_error("no " + name);
  return table[static_cast<size_t>(index)];
}

TEST(Moe, ParameterCountsOfKnownModels) {
  EXPECT_EQ(count_parameters(table_of(mixtral_8x7b())), 46'702'792'704);
  EXPECT_EQ(count_active_parameters(mixtral_8x7b(), table_of(mixtral_8x7b())), 12'879'925'248);
  // The published model has biases of 3 x 2048 per layer as well.
  EXPECT_EQ(count_parameters(table_of(qwen_moe())), 14'315'784'192 - 24 * 3 * 2048);
  EXPECT_EQ(
      count_active_parameters(testing::llama3_8b_shape(), table_of(testing::llama3_8b_shape())),
      8'030'261'248);
}

TEST(Moe, TablesHaveHuggingFaceNames) {
  ModelShape s = mixtral_8x7b();
  s.num_hidden_layers = 1;
  s.experts.count = 2;
  std::vector<std::string> names;
  for (const ParamSpec& spec : table_of(s)) names.push_back(spec.name);
  const std::string moe = "model.layers.0.block_sparse_moe.";
  EXPECT_THAT(
      std::vector<std::string>(names.begin() + 7, names.end()),
      ::testing::ElementsAre(moe + "gate.weight", moe + "experts.0.w1.weight",
                             moe + "experts.0.w3.weight", moe + "experts.0.w2.weight",
                             moe + "experts.1.w1.weight", moe + "experts.1.w3.weight",
                             moe + "experts.1.w2.weight", "model.norm.weight", "lm_head.weight"));
  EXPECT_EQ(names[6], "model.layers.0.post_attention_layernorm.weight");
}

TEST(Moe, SpecsSayHowExpertsAreHeldAndSummed) {
  const auto table = table_of(qwen_moe());
  const std::string mlp = "model.layers.3.mlp.";
  const ParamSpec gate = spec_of(table, mlp + "experts.41.gate_proj.weight"),
                  up = spec_of(table, mlp + "experts.41.up_proj.weight"),
                  down = spec_of(table, mlp + "experts.41.down_proj.weight"),
                  other = spec_of(table, mlp + "experts.40.up_proj.weight");
  EXPECT_EQ(gate.shape, (Shape{1408, 2048}));
  EXPECT_EQ(down.shape, (Shape{2048, 1408}));
  for (const ParamSpec& spec : {gate, up, down}) {
    EXPECT_EQ(spec.expert, 41);
    EXPECT_EQ(spec.num_experts, 60);
    EXPECT_EQ(spec.block, 4);
    EXPECT_EQ(spec.tensor.kind, ShardRule::Kind::kReplicate);
    EXPECT_TRUE(spec.decay);
  }
  EXPECT_EQ(gate.fuse_group, up.fuse_group);
  EXPECT_NE(gate.fuse_group, other.fuse_group);
  EXPECT_EQ(down.fuse_group, -1);
  const ParamSpec router = spec_of(table, mlp + "gate.weight");
  EXPECT_EQ(router.expert, -1);
  EXPECT_EQ(router.site, Site::kSplit);  // tokens are split over tp, so its gradient is partial
  EXPECT_EQ(router.tensor.kind, ShardRule::Kind::kReplicate);
  const ParamSpec shared = spec_of(table, mlp + "shared_expert.down_proj.weight");
  EXPECT_EQ(shared.tensor.kind, ShardRule::Kind::kSplit);
  EXPECT_EQ(shared.tensor.dim, 1);
  EXPECT_EQ(shared.expert, -1);
  const ParamSpec shared_gate = spec_of(table, mlp + "shared_expert_gate.weight");
  EXPECT_EQ(shared_gate.site, Site::kResidual);
  EXPECT_EQ(shared_gate.shape, (Shape{1, 2048}));
  EXPECT_EQ(index_of(table, mlp + "gate_proj.weight"), -1);
  std::map<std::string, int64_t> groups;
  for (const auto& [name, count] : parameter_groups(table)) groups[name] = count;
  EXPECT_EQ(groups.at("router"), 24 * 60 * 2048);
  EXPECT_EQ(groups.at("experts"), int64_t{24} * (60 * 3 * 1408 * 2048 + 3 * 5632 * 2048 + 2048));
  EXPECT_FALSE(groups.contains("feed-forward"));
}

TEST(Moe, LayoutHoldsEachExpertOnItsRanks) {
  ModelShape s = testing::tiny_shape();
  s.family = "moe";
  s.experts = {.count = 8, .per_token = 2, .intermediate_size = 6};
  LayoutOptions options;
  options.grid = Grid({.dp_replicate = 2, .dp_shard = 2, .cp = 1, .tp = 2, .ep = 2});
  options.zero_stage = 1;
  const Layout layout(s, table_of(s), options);
  std::map<std::string, std::set<int>> holders;
  for (int rank = 0; rank < 8; ++rank)
    for (const FlatBuffer& buffer : layout.rank(rank).buffers)
      for (const LocalParam& param : buffer.params) {
        const ParamSpec& spec = layout.table()[static_cast<size_t>(param.spec)];
        holders[spec.name].insert(rank);
        EXPECT_EQ(buffer.sum_axes, spec.expert >= 0 ? kExpertDataAxes : kDenseAxes) << spec.name;
        if (spec.name.find("mlp.gate.") != std::string::npos) {
          EXPECT_TRUE(param.extra_sum.has(Axis::kTp));
        }
      }
  EXPECT_EQ(holders.at("model.layers.1.mlp.experts.3.up_proj.weight"), (std::set{0, 2, 4, 6}));
  EXPECT_EQ(holders.at("model.layers.1.mlp.experts.4.up_proj.weight"), (std::set{1, 3, 5, 7}));
  EXPECT_EQ(holders.at("model.layers.1.mlp.gate.weight").size(), 8U);
}

TEST(Moe, ForwardFlopsCountTheExpertsOfAToken) {
  const ModelShape s = mixtral_8x7b();
  const ForwardFlops flops = find_family("mixtral").forward_flops(s, 4096);
  const auto table = table_of(s);
  int64_t weights = count_active_parameters(s, table);
  for (const ParamSpec& spec : table)
    if (spec.shape.size() == 1 || spec.tensor.kind == ShardRule::Kind::kVocab)
      weights -= numel(spec.shape);
  EXPECT_EQ(flops.linear, 2.0 * static_cast<double>(weights));
  ModelShape dense = s;
  dense.family = "llama";
  EXPECT_EQ(flops.attention, find_family("llama").forward_flops(dense, 4096).attention);
  const ModelShape q = qwen_moe();
  EXPECT_EQ(find_family("moe").forward_flops(q, 1).linear,
            2.0 * 24 * 2048 * (4 * 2048 + 60 + 3 * (4 * 1408 + 5632) + 1));
}

TEST(Moe, ActivationsAreLlamasPlusTheExperts) {
  const ModelShape s = qwen_moe();
  const ActivationQuery query{.tokens = 2048, .sequence_length = 1024, .samples = 2};
  const ActivationBytes bytes = find_family("moe").activation_bytes(s, query);
  int64_t layer = 0;
  std::map<std::string, int64_t> terms;
  for (const ActivationTerm& term : bytes.terms) {
    if (term.part != ActivationTerm::Part::kLayer) continue;
    layer += term.bytes;
    terms[term.name] = term.bytes;
  }
  EXPECT_EQ(bytes.saved_per_layer, layer);
  EXPECT_EQ(terms.at("experts, gate and up"), allocation_bytes(int64_t{2048} * 4 * 2 * 1408 * 4));
  EXPECT_EQ(terms.at("tokens in expert order"), allocation_bytes(int64_t{2048} * 4 * 2048 * 4));
  EXPECT_EQ(terms.at("router logits"), allocation_bytes(2048 * 60 * 4));
  EXPECT_EQ(terms.at("shared expert, gate x up"), allocation_bytes(int64_t{2048} * 5632 * 4));
  EXPECT_FALSE(terms.contains("gate and up"));  // the dense MLP's
  ModelShape dense = s;
  dense.family = "llama";
  dense.experts = {};
  const ActivationBytes llama = find_family("llama").activation_bytes(dense, query);
  EXPECT_EQ(bytes.saved_head, llama.saved_head);
  EXPECT_EQ(bytes.saved_embedding, llama.saved_embedding);
  EXPECT_GE(bytes.layer_workspace, int64_t{2048} * 4 * 2048 * 4);
}

TEST(Moe, CapacityIsRoundedUpAndWithinTheRow) {
  const auto capacity = [](double factor, int64_t count, int64_t per_token, int64_t tokens) {
    return expert_capacity({.count = count, .per_token = per_token, .capacity_factor = factor},
                           tokens);
  };
  EXPECT_EQ(capacity(1, 8, 2, 32), 8);
  EXPECT_EQ(capacity(1.25, 8, 2, 32), 10);
  EXPECT_EQ(capacity(1.3, 8, 2, 32), 11);
  EXPECT_EQ(capacity(0.01, 8, 2, 32), 1);
  EXPECT_EQ(capacity(1000, 8, 2, 32), 32);
  EXPECT_EQ(capacity(1, 3, 1, 10), 4);
  EXPECT_EQ(capacity(0.1, 10, 1, 1000), 10);  // 0.1 x 100 is above 10 in binary
  EXPECT_EQ(expert_capacity({.count = 8, .per_token = 2}, 32), 32);
}

TEST(Moe, ExchangesAreExactInRowsAndBoundedInBytes) {
  const ModelShape s = mixtral_8x7b();
  const ExpertExchange x = expert_exchange(s, 4, 1000, DType::kBf16, false);
  const int64_t row = 4096 * 2;
  EXPECT_EQ(x.calls, 4);
  EXPECT_EQ(x.rows_out, 2000);
  EXPECT_EQ(x.rows_back_most, 4 * 1000 * 2);
  EXPECT_EQ(x.bytes_least, 2 * 2000 * row);
  EXPECT_EQ(x.bytes_most, 2 * (2000 + 8000) * row);
  EXPECT_EQ(x.group_bytes, 4 * 4 * 2000 * row);
  EXPECT_EQ(expert_exchange(s, 4, 1000, DType::kBf16, true).calls, 6);
  EXPECT_EQ(expert_exchange(s, 8, 1000, DType::kBf16, false).rows_back_most, 8 * 1000);
  EXPECT_EQ(expert_exchange(s, 1, 1000, DType::kBf16, false).calls, 0);
  EXPECT_EQ(expert_exchange(testing::llama3_8b_shape(), 4, 10, DType::kBf16, false).calls, 0);
}

ModelShape read_back(const ModelShape& shape) {
  return from_hf_config(to_hf_config(shape, DType::kBf16), "config.json");
}

// Files do not carry what belongs to training.
ExpertShape in_files(ExpertShape e) {
  e.auxiliary_loss = e.z_loss = e.bias_update_rate = 0;
  e.auxiliary_scope = "sequence";
  e.capacity_factor.reset();
  return e;
}

TEST(MoeConfig, MixtralRoundTrips) {
  ModelShape s = mixtral_8x7b();
  s.experts.auxiliary_loss = 0.02;
  s.experts.capacity_factor = 1.5;
  const Json config = Json::parse(to_hf_config(s, DType::kBf16));
  EXPECT_EQ(config["architectures"][0], "MixtralForCausalLM");
  EXPECT_EQ(config["model_type"], "mixtral");
  EXPECT_EQ(config["num_local_experts"], 8);
  EXPECT_EQ(config["num_experts_per_tok"], 2);
  EXPECT_EQ(config["intermediate_size"], 14336);
  EXPECT_EQ(config["router_aux_loss_coef"], 0.02);
  const ModelShape back = read_back(s);
  EXPECT_EQ(back.family, "mixtral");
  EXPECT_EQ(back.experts, in_files(s.experts));
  EXPECT_EQ(count_parameters(table_of(back)), 46'702'792'704);
  s.sliding_window = 4096;
  EXPECT_EQ(Json::parse(to_hf_config(s, DType::kBf16))["model_type"], "mixtral");
  EXPECT_EQ(read_back(s).sliding_window, 4096);
}

TEST(MoeConfig, NamesTheArchitectureThatComputesTheSame) {
  const ModelShape s = qwen_moe();
  const auto type = [](const ModelShape& shape) {
    return Json::parse(to_hf_config(shape, DType::kBf16))["model_type"].get<std::string>();
  };
  EXPECT_EQ(type(s), "qwen2_moe");
  EXPECT_EQ(read_back(s).experts, s.experts);
  const auto differs = [&](const std::function<void(ModelShape&)>& change) {
    ModelShape other = s;
    change(other);
    EXPECT_EQ(type(other), "capstan_moe");
    const ModelShape back = read_back(other);
    EXPECT_EQ(back.family, "moe");
    EXPECT_EQ(back.experts, in_files(other.experts));
  };
  differs([](ModelShape& o) { o.experts.router = "sigmoid"; });
  differs([](ModelShape& o) { o.experts.shared_gate = false; });
  differs([](ModelShape& o) {
    o.experts.shared_gate = false;
    o.experts.shared_intermediate_size = 0;
  });
  differs([](ModelShape& o) {
    o.experts.groups = 6;
    o.experts.groups_per_token = 2;
  });
  differs([](ModelShape& o) { o.experts.scaling = 2.5; });
  differs([](ModelShape& o) { o.attention_output_bias = true; });
  differs([](ModelShape& o) { o.qk_norm = true; });
  differs([](ModelShape& o) { o.sliding_window = 64; });
}

std::string refusal_of(const ModelShape& shape, const std::function<void(Json&)>& change) {
  Json config = Json::parse(to_hf_config(shape, DType::kBf16));
  change(config);
  try {
    (void)from_hf_config(config.dump(), "config.json");
  } catch (const DataError& e) {
    return e.what();
  }
  return "accepted";
}

// As Qwen1.5-MoE has it, where the key is often left out.
TEST(MoeConfig, Qwen2MoeMayHaveBiasesOfQkv) {
  ModelShape shape = qwen_moe();
  shape.attention_bias = true;
  Json config = Json::parse(to_hf_config(shape, DType::kBf16));
  EXPECT_EQ(config["model_type"], "qwen2_moe");
  EXPECT_EQ(config["qkv_bias"], true);
  config.erase("qkv_bias");
  const ModelShape back = from_hf_config(config.dump(), "config.json");
  EXPECT_TRUE(back.attention_bias);
  EXPECT_FALSE(back.attention_output_bias);
}

TEST(MoeConfig, WhatThisBuildDoesNotComputeIsRefused) {
  const auto mixtral = [](const std::function<void(Json&)>& change) {
    return refusal_of(mixtral_8x7b(), change);
  };
  EXPECT_THAT(mixtral([](Json& c) { c["router_jitter_noise"] = 0.1; }),
              HasSubstr("router_jitter_noise"));
  EXPECT_THAT(mixtral([](Json& c) { c["num_experts_per_tok"] = 9; }),
              HasSubstr("num_experts_per_tok 9 is above the 8 experts"));
  EXPECT_THAT(mixtral([](Json& c) { c["num_local_experts"] = 0; }), HasSubstr("num_local_experts"));
  const auto qwen = [](const std::function<void(Json&)>& change) {
    return refusal_of(qwen_moe(), change);
  };
  EXPECT_THAT(qwen([](Json& c) { c["qkv_bias"] = 1; }), HasSubstr("qkv_bias"));
  EXPECT_THAT(qwen([](Json& c) { c["decoder_sparse_step"] = 2; }),
              HasSubstr("decoder_sparse_step"));
  EXPECT_THAT(qwen([](Json& c) { c["mlp_only_layers"] = {0}; }), HasSubstr("mlp_only_layers"));
  EXPECT_THAT(qwen([](Json& c) { c["shared_expert_intermediate_size"] = 0; }),
              HasSubstr("shared_expert_intermediate_size"));
  ModelShape grouped = qwen_moe();
  grouped.experts.groups = 6;
  EXPECT_THAT(refusal_of(grouped, [](Json& c) { c["n_group"] = 7; }), HasSubstr("groups"));
  EXPECT_THAT(refusal_of(grouped, [](Json& c) { c["capstan_router"] = "tanh"; }),
              HasSubstr("capstan_router"));
}

constexpr const char* kExperts[] = {"model.family=moe", "model.experts.count=8"};

recipe::Resolved resolved_moe(std::vector<std::string> more) {
  std::vector<std::string> overrides(std::begin(kExperts), std::end(kExperts));
  overrides.insert(overrides.end(), more.begin(), more.end());
  return testing::resolved(overrides);
}

TEST(MoePlan, RecipeBecomesShape) {
  const Plan plan = testing::plan_of(
      resolved_moe({"model.experts.router=sigmoid", "model.experts.groups=4",
                    "model.experts.groups_per_token=2", "model.experts.capacity_factor=1.5",
                    "model.experts.bias_update_rate=0.001", "model.experts.z_loss=0.001"}),
      testing::machine(1));
  const ExpertShape& e = plan.model().shape.experts;
  EXPECT_EQ(e.count, 8);
  EXPECT_EQ(e.per_token, 2);
  EXPECT_EQ(e.intermediate_size, plan.model().shape.intermediate_size);
  EXPECT_EQ(plan.resolved.model.experts.intermediate_size, e.intermediate_size);
  EXPECT_EQ(e.router, "sigmoid");
  EXPECT_EQ(e.groups, 4);
  EXPECT_EQ(e.groups_per_token, 2);
  EXPECT_EQ(e.capacity_factor, 1.5);
  EXPECT_EQ(e.bias_update_rate, 0.001);
  EXPECT_EQ(e.z_loss, 0.001);
  EXPECT_TRUE(e.keeps_state());
  const std::string text = describe_plan(plan);
  EXPECT_THAT(text, HasSubstr("8 experts of "));
  EXPECT_THAT(text, HasSubstr("of them for one token"));
  EXPECT_THAT(text, HasSubstr("router"));
}

Topology gpu() {
  Topology topology = testing::machine(1);
  topology.device = "cuda";
  return topology;
}

TEST(MoePlan, GraphsNeedRowsThatTheHostDoesNotCount) {
  const auto plan = [](const char* set) {
    return testing::plan_of(resolved_moe({"run.graphs=true", "precision.compute=bf16", set}),
                            gpu());
  };
  EXPECT_TRUE(plan("model.experts.capacity_factor=1.5").resolved.run.graphs);
  const auto why = [&](const char* set) -> std::string {
    try {
      (void)plan(set);
      return "accepted";
    } catch (const recipe::RecipeError& e) {
      return e.what();
    }
  };
  EXPECT_THAT(why("precision.compute=fp32"), HasSubstr("Set precision.compute: bf16"));
  EXPECT_THAT(why("model.experts.intermediate_size=20"), HasSubstr("multiples of 8"));
  EXPECT_THAT(why("model.experts.count=520"), HasSubstr("more than 512 experts"));
}

// Room for what a capacity lets each rank hand over to each expert.
TEST(MoePlan, ExchangesOfACapacityHaveOneSize) {
  const ExpertShape e{.count = 8, .per_token = 2, .capacity_factor = 1.5};
  EXPECT_EQ(expert_room(e, 4, 100, 400), 4 * 38);  // ceil(1.5 x 100 x 2 / 8)
  EXPECT_EQ(expert_room(e, 4, 100, 50), 50);       // a rank with few of the tokens
  Topology gpus = testing::machine(2);
  gpus.device = "cuda";
  const auto traffic = [&](std::vector<std::string> more) {
    more.insert(more.end(),
                {"precision.compute=bf16", "parallel.expert=2", "parallel.zero.stage=1"});
    const Plan plan = testing::plan_of(resolved_moe(more), gpus);
    std::map<std::string, int64_t> bytes;
    for (const auto& [key, entry] : plan.traffic)
      if (key.starts_with("ep/")) bytes[key] = entry.bytes / entry.calls;
    return std::pair(bytes, plan);
  };
  const auto [counted, plan] = traffic({});
  const ModelShape& s = plan.model().shape;
  const int64_t tokens = plan.batch.micro_samples * plan.batch.sequence_length;
  EXPECT_EQ(counted, (std::map<std::string, int64_t>{
                         {"ep/all_to_all_v", tokens * s.experts.per_token * s.hidden_size * 2}}));
  const auto [fixed, same] = traffic({"model.experts.capacity_factor=1.0"});
  const int64_t room = expert_room(same.model().shape.experts, plan.batch.micro_samples,
                                   plan.batch.sequence_length, tokens);
  EXPECT_EQ(fixed, (std::map<std::string, int64_t>{
                       {"ep/all_to_all", s.experts.count * room * s.hidden_size * 2}}));
}

// A rank with all experts keeps room where that costs next to nothing.
TEST(MoePlan, OwnExpertsHaveRoomWhereItIsCheap) {
  const auto room = [](double factor, int64_t rows, int64_t tokens) {
    return own_expert_room({.count = 8, .per_token = 2, .capacity_factor = factor}, rows, 100,
                           tokens);
  };
  EXPECT_EQ(room(1, 4, 400), 4 * 25);
  EXPECT_EQ(room(0.5, 4, 400), 4 * 13);  // ceil(12.5)
  EXPECT_EQ(room(1.06, 4, 400), 0);      // 8 x 4 x 27 for 800 choices
  EXPECT_EQ(room(1.04, 4, 400), 4 * 26);
  EXPECT_EQ(room(1, 4, 200), 0);  // half of the tokens of each row
  EXPECT_EQ(own_expert_room({.count = 8, .per_token = 2}, 4, 100, 400), 0);
  const auto plan_of = [](const std::string& factor) {
    return testing::plan_of(resolved_moe({"precision.compute=bf16", "model.experts.count=32",
                                          "model.experts.capacity_factor=" + factor}),
                            gpu());
  };
  const Plan cheap = plan_of("1.0"), dear = plan_of("1.5");
  EXPECT_TRUE(knows_expert_rows(cheap));
  EXPECT_FALSE(knows_expert_rows(dear));
  EXPECT_LT(cheap.memory.workspace, dear.memory.workspace);  // no product of all gradients
}

// The weight gradients of all experts at once, instead of one after the other.
TEST(MoePlan, OneProductForAllExpertsIsCounted) {
  const ModelShape s = qwen_moe();
  ActivationQuery query{.tokens = 64,
                        .sequence_length = 64,
                        .samples = 1,
                        .compute = DType::kBf16,
                        .gradients = DType::kFp32};
  const int64_t one = find_family("moe").activation_bytes(s, query).layer_workspace;
  query.grouped_experts = 60;
  const int64_t all = find_family("moe").activation_bytes(s, query).layer_workspace;
  const int64_t product = int64_t{60} * 2 * 1408 * 2048 * 2;
  EXPECT_GT(all, product);
  EXPECT_LT(all, product / 8 * 9 + one);  // allocations are rounded up
  EXPECT_LT(one, product / 32);
  const auto workspace = [](const Topology& where) {
    return testing::plan_of(resolved_moe({"precision.compute=bf16", "model.experts.count=32"}),
                            where)
        .memory.workspace;
  };
  EXPECT_GT(workspace(gpu()), workspace(testing::machine(1)));
}

// Where ranks exchange rows the host knows how many each expert gets: one gradient after the other.
TEST(MoePlan, ExpertsThatTravelNeedNoProductOfAll) {
  Topology gpus = testing::machine(2);
  gpus.device = "cuda";
  const auto workspace = [&](int ep) {
    return testing::plan_of(
               resolved_moe({"precision.compute=bf16", "model.experts.count=64",
                             "parallel.zero.stage=1", "parallel.expert=" + std::to_string(ep)}),
               gpus)
        .memory.workspace;
  };
  EXPECT_GT(workspace(1), 2 * workspace(2));
}

TEST(MoePlan, TooManyParametersAreRefused) {
  try {
    (void)testing::plan_of(resolved_moe({"model.experts.count=4096", "model.hidden_size=1048576",
                                         "model.experts.intermediate_size=1048576"}),
                           testing::machine(1));
    FAIL() << "accepted";
  } catch (const recipe::RecipeError& e) {
    EXPECT_THAT(e.what(), HasSubstr("model.experts.count"));
  }
}

}  // namespace
}  // namespace capstan::plan
