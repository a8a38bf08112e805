// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "verbs.h"

namespace capstan::cli {

void add_data(CLI::App& app) {
  CLI::App* data =
      app.add_subcommand("data", "Tokenizers and token files: train, prepare, inspect");
  data->require_subcommand(0, 1);
  data->footer(
      "Example:\n"
      "  capstan data tokenizer train --input my.txt --vocab-size 8192 --output data/my/tokenizer\n"
      "  capstan data prepare --input my.txt --tokenizer data/my/tokenizer --output data/my/train\n"
      "  capstan data inspect data/my/train --tokenizer data/my/tokenizer");
  data->callback([data] {
    if (data->get_subcommands().empty()) throw CLI::CallForHelp();
  });
  add_data_tokenizer(*data);
  add_data_prepare(*data);
  add_data_inspect(*data);
}

}  // namespace capstan::cli
