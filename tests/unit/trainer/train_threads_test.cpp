// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Ranks as threads: what exit.json says of each way to end.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <csignal>
#include <fstream>

#include "capstan/base/error.h"
#include "capstan/base/json.h"
#include "capstan/base/log.h"
#include "capstan/comm/threads.h"
#include "capstan/data/prepare.h"
#include "capstan/text/tokenizer_folder.h"
#include "capstan/trainer/stop.h"
#include "capstan/trainer/train.h"
#include "support/step_recipe.h"
#include "support/temp_dir.h"

namespace capstan::trainer {
namespace {

using testing::HasSubstr;

class TrainThreads : public testing::Test {
 protected:
  TrainThreads() : folder_("train threads") {
    const Path text = folder_ / "text.txt", tokenizer = folder_ / "tokenizer",
               tokens = folder_ / "tokens";
    {
      std::ofstream file(text);
      for (int i = 0; i < 400; ++i) file << "what was read may be written again, row " << i << "\n";
    }
    text::TrainFolderOptions train;
    train.sources.inputs = {text};
    train.trainer.vocab_size = 260;
    train.output = tokenizer;
    (void)text::train_tokenizer_folder(train);
    data::PrepareOptions prepare;
    prepare.inputs = {text.string()};
    prepare.tokenizer = tokenizer.string();
    prepare.output = tokens.string();
    (void)data::prepare(prepare);
    const std::string recipe = "version: 1\nrun: {name: threads, directory: '" + run().string() +
                               "', steps: 4, threads: 1}\n"
                               "model: {hidden_size: 16, intermediate_size: 16, "
                               "num_hidden_layers: 1, num_attention_heads: 2}\n"
                               "data: {tokenizer: '" +
                               tokenizer.string() + "', train: [{path: '" + tokens.string() +
                               "'}]}\n"
                               "batch: {global_samples: 2, micro_samples: 1, sequence_length: 8}\n"
                               "optimizer: {lr: 1.0e-2}\nprecision: {compute: fp32}\n"
                               "checkpoint: {interval_steps: 2, asynchronous: false}\n";
    options_.recipe = recipe::parse_recipe(recipe, "threads.yaml");
    options_.local_size = 2;
    options_.console = false;
  }
  ~TrainThreads() override { clear_stop(); }
  [[nodiscard]] Path run() const { return folder_ / "run"; }
  [[nodiscard]] json::Json report() const {
    return json::parse(read_file(run() / "exit.json"), "exit.json");
  }
  test::TempDir folder_;
  TrainOptions options_;
};

TEST_F(TrainThreads, Done_IsReported) {
  const TrainResult result = train_as_threads(options_, 2);
  EXPECT_EQ(result.exit_code, 0);
  EXPECT_EQ(result.step, 4);
  EXPECT_EQ(report()["class"], "done");
  EXPECT_EQ(report()["last_committed_step"], 4);
  EXPECT_TRUE(report()["signal"].is_null());
}

TEST_F(TrainThreads, AnotherRanksFailure_IsReportedAsTheFirst) {
  options_.on_step = [](int64_t step, double) {
    if (step == 3 && log::thread_rank() == 1)
      throw DataError({.module = "data", .what = "reading shard 1", .got = "a hole"});
  };
  EXPECT_THROW((void)train_as_threads(options_, 2), comm::RankError);
  EXPECT_EQ(report()["rank"], 1);
  EXPECT_EQ(report()["code"], 94);
  EXPECT_EQ(report()["class"], "data");
  EXPECT_EQ(report()["error"], "DataError");
  EXPECT_EQ(report()["last_committed_step"], 2);
  EXPECT_THAT(report()["message"].get<std::string>(), HasSubstr("reading shard 1"));
}

TEST_F(TrainThreads, AForeignException_IsAWorkersFailure) {
  options_.on_step = [](int64_t, double) {
    if (log::thread_rank() == 0) throw std::runtime_error("plain");
  };
  EXPECT_THROW((void)train_as_threads(options_, 2), comm::RankError);
  EXPECT_EQ(report()["rank"], 0);
  EXPECT_EQ(report()["code"], 91);
  EXPECT_EQ(report()["class"], "worker");
  EXPECT_EQ(report()["message"], "plain");
  EXPECT_TRUE(report()["last_committed_step"].is_null());
}

TEST_F(TrainThreads, AStop_IsReportedWithItsSignal) {
  options_.on_step = [](int64_t step, double) {
    if (step == 1 && log::thread_rank() == 1) request_stop(SIGUSR1);
  };
  const TrainResult result = train_as_threads(options_, 2);
  EXPECT_EQ(result.exit_code, 90);
  EXPECT_EQ(report()["class"], "preempted");
  EXPECT_EQ(report()["signal"], "SIGUSR1");
  EXPECT_EQ(report()["last_committed_step"], result.step);
}

TEST_F(TrainThreads, ARefusedResume_KeepsTheReportOfTheRun) {
  (void)train_as_threads(options_, 2);
  const json::Json before = report();
  options_.resume = "none";
  EXPECT_THROW((void)train_as_threads(options_, 2), comm::RankError);
  EXPECT_EQ(report(), before);
}

TEST_F(TrainThreads, ARunOfAGpuOnAMachineWithoutOne_SaysHowToGoOn) {
  (void)train_as_threads(options_, 2);
  test::change_step_recipe(run() / "checkpoints" / "step-00000004", "device: cpu", "device: cuda");
  options_.recipe.recipe.run.steps = 6;
  options_.resume = "auto";
  try {
    (void)train_as_threads(options_, 2);
    FAIL() << "a run of a GPU went on without one";
  } catch (const comm::RankError& error) {
    EXPECT_THAT(error.what(), HasSubstr("--set run.device=cpu --allow-change run.device"));
  }
  options_.recipe.recipe.run.device = "cpu";
  options_.allow_change = {"run.device", "lr_schedule"};
  EXPECT_EQ(train_as_threads(options_, 2).step, 6);
}

}  // namespace
}  // namespace capstan::trainer
