// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Folders that hold a tokenizer: tokenizer.json, tokenizer_config.json and, for one trained here,
// tokenizer_training.json, which says from what. Each file is replaced atomically, tokenizer.json
// after its configuration. An existing tokenizer is never replaced by a different one unless asked
// to.
#pragma once
#include <optional>
#include <string>

#include "capstan/text/bpe_trainer.h"
#include "capstan/text/tokenizer.h"

namespace capstan::text {

struct TrainFolderOptions {
  SourceOptions sources;
  DocumentOptions documents;
  BpeTrainerOptions trainer;
  Path output;
  bool force = false;  // replace a tokenizer that differs
};

struct FolderReport {
  Tokenizer tokenizer;
  bool up_to_date = false;  // the folder already held this result; nothing was trained or copied
  SourceCounts sources;     // training only, as is the next
  int64_t corpus_bytes = 0, distinct_pieces = 0;
};

// Throws ConfigError when the folder holds a different tokenizer and `force` is not set.
[[nodiscard]] FolderReport train_tokenizer_folder(const TrainFolderOptions& options);
// `input` is a folder with tokenizer.json or the file; it is loaded, so that what cannot be
// honoured is refused here, and copied unchanged.
[[nodiscard]] FolderReport import_tokenizer_folder(const Path& input, const Path& output,
                                                   bool force);

}  // namespace capstan::text
