// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// PREFIX.json: what a pair was made of. Training needs it for the tokenizer check and for bits per
// byte; a pair made by other programs has none and works without both.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "capstan/base/file.h"
#include "capstan/data/token_writer.h"

namespace capstan::data {

inline constexpr int64_t kProvenanceVersion = 1;

struct Provenance {
  int64_t version = kProvenanceVersion;  // of this file and of the rules that turn text into tokens
  std::string tokenizer_fingerprint;
  int64_t vocab_size = 0, eos_id = 0;
  std::string split;  // "all", "train" or "validation"
  double validation_fraction = 0;
  std::string field, bad_lines;  // of JSONL: key of the text, "stop" or "skip"
  std::vector<std::string> include, exclude;
  int64_t max_file_bytes = 0;
  bool deduplicate = false;
  std::string sources_xxh3;  // over relative paths, sizes and contents of all files of both splits
  int64_t source_files = 0;  // files read, for both splits, as are the next four
  int64_t left_out_binary = 0, left_out_duplicates = 0, left_out_large = 0, left_out_empty = 0;
  int64_t bad_line_count = 0;
  int64_t text_bytes = 0;  // of text behind the tokens of this pair
  PairSummary pair;
};

[[nodiscard]] std::string to_json(const Provenance& provenance);
// nullopt when PREFIX.json does not exist or is some other program's file; DataError when it is
// damaged.
[[nodiscard]] std::optional<Provenance> read_provenance(const Path& prefix);
// The same, and its sizes must be those of the opened pair.
[[nodiscard]] std::optional<Provenance> read_provenance(const TokenFile& file);
// True when everything that decides the tokens is equal: files, tokenizer, split, JSONL rules.
[[nodiscard]] bool is_same_source(const Provenance& a, const Provenance& b);

}  // namespace capstan::data
