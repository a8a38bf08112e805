// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Counts of distinct pieces, and the cutting of a corpus into parts that can be counted apart.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "capstan/text/bpe_trainer.h"

namespace capstan::text {

class WordCounter {
 public:
  struct Word {
    uint64_t hash;
    uint64_t offset;  // in the arena
    int64_t count;
    uint32_t length;
  };
  WordCounter();
  void add(std::string_view word, int64_t count = 1);
  void add_all(const WordCounter& other);
  [[nodiscard]] std::span<const Word> words() const { return words_; }
  [[nodiscard]] std::string_view bytes_of(const Word& word) const {
    return std::string_view(arena_).substr(word.offset, word.length);
  }
  [[nodiscard]] int64_t memory_bytes() const;

 private:
  void add_hashed(std::string_view word, uint64_t hash, int64_t count);
  void grow();
  std::string arena_;
  std::vector<Word> words_;
  std::vector<uint32_t> slots_;  // index + 1 of a word; 0 = free
};

// The corpus in parts of about a mebibyte, cut where a piece ends in any case. Not thread-safe.
class CorpusFeed {
 public:
  explicit CorpusFeed(const NextText& next) : next_(next) {}
  [[nodiscard]] bool next(std::string& chunk);

 private:
  const NextText& next_;
  std::string part_;
  size_t at_ = 0;
};

// Position after the first newline at or behind `from` that stands between two visible ASCII
// characters: a piece ends there whatever follows. npos when there is none.
[[nodiscard]] size_t next_cut(std::string_view text, size_t from);

struct CorpusCounts {
  WordCounter words;
  int64_t bytes = 0, pieces = 0;
};
// Reads the corpus on several threads; pieces longer than kLongPiece are cut, so that one endless
// line cannot dominate the time of training.
inline constexpr size_t kLongPiece = 512;
[[nodiscard]] CorpusCounts count_words(const NextText& next, const BpeTrainerOptions& options);

// Sources as a stream of text parts.
[[nodiscard]] NextText read_sources(std::span<const Source> sources,
                                    const DocumentOptions& documents);

}  // namespace capstan::text
