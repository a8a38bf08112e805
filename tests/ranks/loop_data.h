// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A folder with a tokenizer, a pair of token files and the recipe of a tiny training in fp64.
#pragma once
#include <fstream>
#include <string>
#include <vector>

#include "capstan/data/prepare.h"
#include "capstan/recipe/load.h"
#include "capstan/text/tokenizer_folder.h"
#include "support/temp_dir.h"

namespace capstan::trainer {

class LoopData {
 public:
  LoopData() : folder_("device loop") {
    const Path text = folder_ / "text.txt";
    {
      std::ofstream file(text);
      for (int i = 0; i < 400; ++i) file << "what was read may be written again, row " << i << "\n";
    }
    text::TrainFolderOptions train;
    train.sources.inputs = {text};
    train.trainer.vocab_size = 260;
    train.output = folder_ / "tokenizer";
    (void)text::train_tokenizer_folder(train);
    data::PrepareOptions prepare;
    prepare.inputs = {text.string()};
    prepare.tokenizer = (folder_ / "tokenizer").string();
    prepare.output = (folder_ / "tokens").string();
    (void)data::prepare(prepare);
  }
  [[nodiscard]] recipe::Resolved recipe(const std::vector<std::string>& overrides) const {
    const std::string tokens = (folder_ / "tokens").string();
    return recipe::parse_recipe(
        "version: 1\nrun: {name: loop, steps: 7, threads: 1}\n"
        "model: {hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, "
        "num_attention_heads: 2}\n"
        "data: {tokenizer: '" +
            (folder_ / "tokenizer").string() + "', train: [{path: '" + tokens +
            "'}], validation: [{name: v, path: '" + tokens +
            "'}]}\n"
            "batch: {global_samples: 4, micro_samples: 1, sequence_length: 8}\n"
            "optimizer: {lr: 1.0e-2}\nprecision: {compute: fp64, master: fp64, gradients: fp64}\n"
            "eval: {interval_steps: 3, samples: 4}\n"
            "checkpoint: {interval_steps: 4, asynchronous: false}\n"
            "metrics: {interval_steps: 1, tensorboard: false}\n",
        "loop.yaml", overrides);
  }
  [[nodiscard]] Path folder(const std::string& name) const { return folder_ / name; }

 private:
  test::TempDir folder_;
};

}  // namespace capstan::trainer
