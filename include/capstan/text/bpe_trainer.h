// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Training of byte-level BPE. The result depends on the multiset of pieces in the corpus and on the
// options, never on the number of threads or the order of documents.
//
// Ids: special tokens in the given order, then the 256 byte symbols in the order of the characters
// that stand for them, then one id per merge. Each merge takes the pair with the highest count;
// among equal counts the pair with the smaller left id, then the smaller right id.
#pragma once
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "capstan/base/file.h"
#include "capstan/text/documents.h"
#include "capstan/text/sources.h"

namespace capstan::text {

enum class PiecePattern { kGpt2, kLlama3, kQwen2 };  // how text is cut before merging
[[nodiscard]] PiecePattern piece_pattern_from_name(
    std::string_view name);  // "gpt2", "llama3", "qwen2"
[[nodiscard]] std::string_view name_of(PiecePattern pattern);

struct BpeTrainerOptions {
  int64_t vocab_size = 8192;  // special tokens, 256 bytes and merges together
  std::vector<std::string> special_tokens = {
      "<|endoftext|>"};  // the first one ends and begins texts
  PiecePattern pattern = PiecePattern::kLlama3;
  int64_t min_count =
      2;            // a pair seen less often is not merged; the vocabulary may then stay smaller
  int threads = 0;  // 0 = all allowed processors
  int64_t max_word_bytes = int64_t{4} << 30;  // memory for distinct pieces, beyond it ConfigError
  // Called from one thread at a time, several times per second: phase ("count", "merge"), done,
  // total (bytes or merges; total 0 = unknown).
  std::function<void(const char* phase, int64_t done, int64_t total)> progress;
};

struct BpeTrainerResult {
  std::vector<std::string> special_tokens;
  std::vector<std::pair<int32_t, int32_t>> merges;  // ids, in order of rank
  std::vector<std::string> token_bytes;             // by id; a special token's own text
  PiecePattern pattern;
  int64_t corpus_bytes = 0, corpus_pieces = 0, distinct_pieces = 0;
};

// Gives the next part of the corpus, false at its end. Called from one worker at a time. A piece
// never crosses from one part to the next.
using NextText = std::function<bool(std::string& part)>;

[[nodiscard]] BpeTrainerResult train_bpe(const NextText& next, const BpeTrainerOptions& options);
// Files are read as a stream: plain text in blocks, JSONL document by document.
[[nodiscard]] BpeTrainerResult train_bpe(std::span<const Source> sources,
                                         const DocumentOptions& documents,
                                         const BpeTrainerOptions& options);

// tokenizer.json and tokenizer_config.json as the `tokenizers` and `transformers` packages read
// them.
[[nodiscard]] std::string tokenizer_json(const BpeTrainerResult& result);
[[nodiscard]] std::string tokenizer_config_json(const BpeTrainerResult& result);

}  // namespace capstan::text
