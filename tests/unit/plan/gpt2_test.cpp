// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The gpt2 family: table, counts, FLOPs, layout.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "capstan/plan/frozen.h"
#include "capstan/plan/layout.h"
#include "recipes.h"
#include "shapes.h"

namespace capstan::plan {
namespace {

using ::testing::HasSubstr;
using testing::index_of;
using testing::table_of;

ModelShape gpt2_124m() {
  ModelShape s;
  s.family = "gpt2";
  s.vocab_size = 50257;
  s.hidden_size = 768;
  s.intermediate_size = 3072;
  s.num_hidden_layers = 12;
  s.num_attention_heads = s.num_key_value_heads = 12;
  s.head_dim = 64;
  s.max_position_embeddings = 1024;
  s.hidden_act = "gelu_pytorch_tanh";
  s.attention_bias = s.attention_output_bias = s.tie_word_embeddings = true;
  return s;
}

TEST(Gpt2, ParameterCountsOfPublishedModels) {
  ModelShape s = gpt2_124m();
  EXPECT_EQ(count_parameters(table_of(s)), 124'439'808);
  s.tie_word_embeddings = false;
  EXPECT_EQ(count_parameters(table_of(s)), 124'439'808 + 50257 * 768);
  s = gpt2_124m();
  s.hidden_size = 1600;
  s.intermediate_size = 6400;
  s.num_hidden_layers = 48;
  s.num_attention_heads = s.num_key_value_heads = 25;
  EXPECT_EQ(count_parameters(table_of(s)), 1'557'611'200);
}

TEST(Gpt2, TableInOrder) {
  ModelShape s = gpt2_124m();
  s.num_hidden_layers = 1;
  s.tie_word_embeddings = false;
  std::vector<std::string> names;
  for (const ParamSpec& spec : table_of(s)) names.push_back(spec.name);
  const std::string h = "transformer.h.0.";
  EXPECT_EQ(names,
            (std::vector<std::string>{
                "transformer.wte.weight",  "transformer.wpe.weight", h + "ln_1.weight",
                h + "ln_1.bias",           h + "attn.q_proj.weight", h + "attn.k_proj.weight",
                h + "attn.v_proj.weight",  h + "attn.q_proj.bias",   h + "attn.k_proj.bias",
                h + "attn.v_proj.bias",    h + "attn.c_proj.weight", h + "attn.c_proj.bias",
                h + "ln_2.weight",         h + "ln_2.bias",          h + "mlp.c_fc.weight",
                h + "mlp.c_fc.bias",       h + "mlp.c_proj.weight",  h + "mlp.c_proj.bias",
                "transformer.ln_f.weight", "transformer.ln_f.bias",  "lm_head.weight"}));
}

TEST(Gpt2, SpecsSayHowToStartDecayAndCut) {
  ModelShape s = gpt2_124m();
  s.initializer_range = 0.03;
  for (const ParamSpec& spec : table_of(s)) {
    SCOPED_TRACE(spec.name);
    const bool is_bias = spec.name.ends_with(".bias");
    const bool is_norm = spec.name.find(".ln_") != std::string::npos;
    const bool is_row = spec.name.ends_with("c_proj.weight");
    const bool is_column =
        spec.name.find("_proj") != std::string::npos || spec.name.find("c_fc") != std::string::npos;
    EXPECT_EQ(spec.decay, !is_bias && !is_norm);
    EXPECT_EQ(spec.init.kind, is_bias   ? Init::Kind::kZeros
                              : is_norm ? Init::Kind::kOnes
                                        : Init::Kind::kNormal);
    if (spec.decay) {
      EXPECT_DOUBLE_EQ(spec.init.deviation, is_row ? 0.03 / std::sqrt(24.0) : 0.03);
    }
    const bool is_cut = is_row || (is_column && !spec.name.ends_with("c_proj.bias"));
    EXPECT_EQ(spec.site, is_cut ? Site::kSplit : Site::kResidual);
    EXPECT_EQ(spec.tensor.kind == ShardRule::Kind::kSplit, is_cut);
    if (is_cut) {
      EXPECT_EQ(spec.tensor.dim, is_row ? 1 : 0);
    }
  }
}

// Positions and norms act on the stream: under sequence parallel every rank has the part of its
// tokens, else all have the whole.
TEST(Gpt2, CopiesAreSummedWhereTheStreamIsCut) {
  for (const bool sequence : {false, true}) {
    LayoutOptions options;
    options.grid = Grid({.tp = 2});
    options.sequence_parallel = sequence;
    const Layout layout(gpt2_124m(), table_of(gpt2_124m()), options);
    const RankLayout rank = layout.rank(1);
    int copies = 0;
    for (const FlatBuffer& buffer : rank.buffers)
      for (const LocalParam& param : buffer.params) {
        const ParamSpec& spec = layout.table()[static_cast<size_t>(param.spec)];
        if (spec.tensor.kind != ShardRule::Kind::kReplicate) continue;
        EXPECT_EQ(param.extra_sum.has(Axis::kTp), sequence) << spec.name;
        ++copies;
      }
    EXPECT_EQ(copies, 1 + 12 * 6 + 2);  // positions; norms and row biases; the last norm
  }
}

TEST(Gpt2, FlopsOfTheSmallest) {
  const ModelShape s = gpt2_124m();
  const ForwardFlops flops = find_family("gpt2").forward_flops(s, 1024);
  EXPECT_DOUBLE_EQ(flops.linear, 2.0 * 12 * (4.0 * 768 * 768 + 2.0 * 768 * 3072));
  EXPECT_DOUBLE_EQ(flops.head, 2.0 * 768 * 50257);
  EXPECT_DOUBLE_EQ(flops.attention, 12 * 4.0 * 768 * 1025 / 2);
  EXPECT_DOUBLE_EQ(flops.again_mlp, 2.0 * 12 * 768 * 3072);
  EXPECT_DOUBLE_EQ(flops.again_attention, 2.0 * 12 * 3 * 768 * 768 + flops.attention);
}

// What a layer keeps of a token, in fp32 and without cuts: two norms with their inputs and
// statistics, q, k, v, attention, the MLP before and after its activation.
TEST(Gpt2, SavedPerLayer) {
  const ModelShape s = gpt2_124m();
  ActivationQuery query;
  query.samples = 4;
  query.sequence_length = 1024;
  query.tokens = 4096;
  const ActivationBytes bytes = find_family("gpt2").activation_bytes(s, query);
  const int64_t numbers = 4 * 768 + 2 * 2 + 3 * 768 + 768 + 12 + 2 * 3072;
  EXPECT_NEAR(static_cast<double>(bytes.saved_per_layer),
              static_cast<double>(numbers * 4 * query.tokens), 0.05 * 4096 * 4 * 12e3);
  for (const ActivationTerm& term : bytes.terms)
    EXPECT_EQ(term.name.find("gate"), std::string::npos);
}

TEST(Gpt2, PlansAndDescribesItself) {
  const Plan plan =
      testing::plan_of(testing::resolved({"model.family=gpt2", "model.num_key_value_heads=auto"}),
                       testing::machine(1));
  const std::string text = describe_plan(plan);
  for (const char* word : {"gpt2, 4 layers", "positions", "norms", "attention", "feed-forward"})
    EXPECT_THAT(text, HasSubstr(word));
  for (const auto& [group, count] : parameter_groups(plan.model().table()))
    EXPECT_NE(group, "other");
}

TEST(Gpt2, AFrozenTiedHeadIsExplained) {
  try {
    (void)testing::plan_of(testing::resolved({"model.family=gpt2", "model.num_key_value_heads=auto",
                                              "model.frozen=['lm_head.*']"}),
                           testing::machine(1));
    FAIL() << "no error";
  } catch (const recipe::RecipeError& error) {
    EXPECT_THAT(error.what(), HasSubstr("a tied head is transformer.wte.weight"));
  }
}

}  // namespace
}  // namespace capstan::plan
