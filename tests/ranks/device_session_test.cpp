// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A trained model used on a device: the texts and scores of the CPU, one wait a token.
#include <gtest/gtest.h>

#include <map>

#include "capstan/infer/session.h"
#include "capstan/ops/device_kernels.h"
#include "capstan/trainer/evaluate.h"
#include "capstan/trainer/train.h"
#include "ranks/loop_data.h"
#include "support/fake_device/fake_device.h"
#include "support/fake_device/fake_kernels.h"
#include "support/step_recipe.h"

namespace capstan::trainer {
namespace {

constexpr int64_t kTokens = 24;

LoopData& data() {
  static LoopData made;
  return made;
}

struct Model {
  const char* name;
  std::vector<std::string> overrides;
};
std::vector<Model> models() {
  const std::string fp32 =
      "precision={compute: fp32, residual: fp32, master: fp32, gradients: fp32}";
  return {{"fp64", {}},
          {"fp32", {fp32}},
          {"bf16", {"precision={compute: bf16, master: fp32, gradients: fp32}"}},
          {"experts", {"model.family=moe", "model.experts.count=4", "model.experts.per_token=2"}},
          {"window", {"model.sliding_window=5"}}};
}

struct Used {
  std::vector<infer::Generated> texts;  // greedy, seeded, of a nucleus
  EvalResult result;
  std::vector<double> scores;
};

void train_model(const Model& model) {
  std::vector<std::string> overrides = model.overrides;
  overrides.push_back("run.directory=" + data().folder(model.name).string());
  overrides.emplace_back("model.max_position_embeddings=64");
  TrainOptions options{.recipe = data().recipe(overrides)};
  options.console = false;
  EXPECT_EQ(train_as_threads(options, 1).exit_code, 0);
}

infer::Session open(const Model& model) {
  return infer::Session({.model = data().folder(model.name), .threads = 1, .overrides = {}});
}

std::vector<infer::GenerateOptions> ways() {
  infer::GenerateOptions greedy{.max_tokens = kTokens, .stop_at_end = false}, seeded = greedy,
                                                                              nucleus = greedy;
  greedy.sampling.temperature = 0;
  seeded.sampling.seed = 5;
  nucleus.sampling = {.temperature = 0.7, .top_k = 40, .top_p = 0.9, .seed = 6};
  return {greedy, seeded, nucleus};
}

Used use(const Model& model) {
  infer::Session session = open(model);
  Used used;
  for (const infer::GenerateOptions& way : ways())
    used.texts.push_back(infer::generate(session, "what was read", way));
  const data::Documents documents = data::parse_documents(session.plan().resolved.data.documents);
  const data::ValidationSet set({.name = "v",
                                 .path = data().folder("tokens").string(),
                                 .sequence_length = 8,
                                 .documents = documents,
                                 .vocab_size = session.plan().model().shape.vocab_size,
                                 .tokenizer_fingerprint = session.tokenizer().fingerprint()});
  EvalOptions options{.samples = 9};
  options.per_token = [&](const TokenScore& token) {
    if (token.logprob) used.scores.push_back(*token.logprob);
  };
  mesh::Mesh mesh;
  used.result = evaluate(session.engine(), mesh, set, documents, options);
  return used;
}

// What the CPU gives, before there is a device: a process has one.
class OnTheCpu : public ::testing::Environment {
 public:
  static std::map<std::string, Used>& results() {
    static std::map<std::string, Used> of_model;
    return of_model;
  }
  void SetUp() override {
    for (const Model& model : models()) {
      train_model(model);
      results()[model.name] = use(model);
    }
    std::filesystem::copy(data().folder("fp64"), data().folder("graphs"),
                          std::filesystem::copy_options::recursive);
    const Path step = data().folder("graphs") / "checkpoints" / "step-00000007";
    test::change_step_recipe(step, "device: cpu", "device: cuda");
    test::change_step_recipe(step, "graphs: false", "graphs: true");
    (void)use({.name = "graphs", .overrides = {}});
    test::install_fake_device();
  }
};
const auto* const on_the_cpu = ::testing::AddGlobalTestEnvironment(new OnTheCpu);

class DeviceSession : public ::testing::TestWithParam<bool> {
 public:
  void SetUp() override {
    if (GetParam()) ops::install_device_kernels(&test::fake_kernels());
  }
  void TearDown() override { ops::install_device_kernels(nullptr); }
};

TEST_P(DeviceSession, TextsAndScoresAreThoseOfTheCpu) {
  for (const Model& model : models()) {
    SCOPED_TRACE(model.name);
    const std::string name = model.name;
    const Used got = use(model);
    const Used& want = OnTheCpu::results().at(name);
    const double close = name == "fp32" ? 1e-4 : name.starts_with("bf16") ? 0.1 : 1e-9;
    for (size_t i = 0; i < want.texts.size() && !name.starts_with("bf16"); ++i)
      EXPECT_EQ(got.texts[i].tokens, want.texts[i].tokens) << "way " << i;
    EXPECT_NEAR(got.result.loss, want.result.loss, close);
    EXPECT_EQ(got.result.target_tokens, want.result.target_tokens);
    ASSERT_EQ(got.scores.size(), want.scores.size());
    for (size_t i = 0; i < want.scores.size(); ++i)
      ASSERT_NEAR(got.scores[i], want.scores[i], close) << "token " << i;
  }
}

TEST_P(DeviceSession, TheHostWaitsOncePerToken) {
  infer::Session session = open(models().front());
  const auto waits_for = [&](int64_t tokens) {
    const int64_t before = test::host_syncs();
    infer::GenerateOptions options{.max_tokens = tokens, .stop_at_end = false};
    (void)infer::generate(session, "what was read", options);
    return test::host_syncs() - before;
  };
  (void)waits_for(2);
  const int64_t few = waits_for(4), many = waits_for(12);
  EXPECT_EQ(few, 4) << test::last_host_syncs(12);
  EXPECT_EQ(many, 12) << test::last_host_syncs(12);
}

// What only training does with a device does not stand in the way.
TEST_P(DeviceSession, ARunByGraphs_IsUsedLikeAnother) {
  EXPECT_EQ(use({.name = "graphs", .overrides = {}}).scores,
            use({.name = "fp64", .overrides = {}}).scores);
}

// A model that was trained by many ranks need not be trainable by one.
TEST_P(DeviceSession, MemoryOfTraining_IsNotAskedFor) {
  const std::string many = "=16777216";
  EXPECT_NO_THROW(
      infer::Session({.model = data().folder("fp64"),
                      .threads = 1,
                      .overrides = {"batch.micro_samples" + many, "batch.global_samples" + many}}));
}

INSTANTIATE_TEST_SUITE_P(Forms, DeviceSession, ::testing::Bool(),
                         [](const auto& one) { return one.param ? "ByOurKernels" : "ByAten"; });

}  // namespace
}  // namespace capstan::trainer
