// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The merge loop: exact pair counts, kept current word by word, and a heap whose entries are
// corrected when they come up.
#include "capstan/text/bpe_trainer.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <queue>

#include "capstan/base/bytes.h"
#include "capstan/base/error.h"
#include "capstan/base/text.h"
#include "text/bpe.h"
#include "text/byte_map.h"
#include "text/word_counter.h"

namespace capstan::text {
namespace {

constexpr int64_t kMaxVocabulary = 1 << 24;

[[noreturn]] void refuse(const std::string& what, const std::string& got, const std::string& need) {
  throw ConfigError(
      {.module = "text", .what = "training a tokenizer: " + what, .got = got, .need = need});
}

void check_options(const BpeTrainerOptions& options) {
  const auto least = static_cast<int64_t>(options.special_tokens.size()) + 256;
  if (options.vocab_size < least || options.vocab_size > kMaxVocabulary) {
    refuse("vocab size", format_count(options.vocab_size),
           fmt::format("{} to {} (256 bytes and {} special tokens are always in)", least,
                       format_count(kMaxVocabulary), options.special_tokens.size()));
  }
  if (options.threads < 0 || options.threads > 1024) {
    refuse("threads", std::to_string(options.threads), "0 (all) to 1024");
  }
  if (options.min_count < 1) refuse("min count", std::to_string(options.min_count), "1 or more");
  std::vector<std::string> seen;
  for (const std::string& token : options.special_tokens) {
    if (token.empty() || find_invalid_utf8(token)) refuse("special token", quote(token), "text");
    const auto bytes = symbols_to_bytes(token);
    if (bytes && bytes->size() == 1)
      refuse("special token", quote(token), "more than one character");
    if (std::find(seen.begin(), seen.end(), token) != seen.end()) {
      refuse("special tokens", quote(token) + " twice", "each once");
    }
    seen.push_back(token);
  }
}

// (left id, right id) -> number of the pair, open addressing.
class PairNumbers {
 public:
  PairNumbers() : slots_(1 << 16, 0) {}
  uint32_t number_of(uint64_t key) {
    size_t slot = slot_of(key);
    for (; slots_[slot] != 0; slot = (slot + 1) & (slots_.size() - 1)) {
      if (keys_[slots_[slot] - 1] == key) return slots_[slot] - 1;
    }
    keys_.push_back(key);
    slots_[slot] = static_cast<uint32_t>(keys_.size());
    if (keys_.size() * 2 > slots_.size()) grow();
    return static_cast<uint32_t>(keys_.size() - 1);
  }
  [[nodiscard]] uint64_t key_of(uint32_t number) const { return keys_[number]; }

 private:
  [[nodiscard]] size_t slot_of(uint64_t key) const {
    key = (key ^ key >> 32) * 0x9e3779b97f4a7c15u;
    return (key ^ key >> 32) & (slots_.size() - 1);
  }
  void grow() {
    slots_.assign(slots_.size() * 2, 0);
    for (size_t i = 0; i < keys_.size(); ++i) {
      size_t slot = slot_of(keys_[i]);
      while (slots_[slot] != 0) slot = (slot + 1) & (slots_.size() - 1);
      slots_[slot] = static_cast<uint32_t>(i + 1);
    }
  }
  std::vector<uint64_t> keys_;
  std::vector<uint32_t> slots_;
};

struct HeapEntry {
  int64_t count;
  uint64_t key;  // left id, right id: smaller first among equal counts
  uint32_t pair;
  bool operator<(const HeapEntry& other) const {
    return count != other.count ? count < other.count : key > other.key;
  }
};

class MergeLearner {
 public:
  MergeLearner(const WordCounter& words, const BpeTrainerOptions& options, BpeTrainerResult& result)
      : options_(options), result_(result) {
    make_alphabet();
    load_words(words);
  }

  void run() {
    const auto total = options_.vocab_size - static_cast<int64_t>(result_.token_bytes.size());
    while (static_cast<int64_t>(result_.token_bytes.size()) < options_.vocab_size) {
      const auto best = take_best();
      if (!best) break;
      const auto left = static_cast<int32_t>(best->key >> 32);
      const auto right = static_cast<int32_t>(best->key & 0xffffffffu);
      const auto id = id_of_merge(left, right);
      if (!id) continue;
      result_.merges.emplace_back(left, right);
      merge_everywhere(best->pair, {left, right, *id});
      if (options_.progress && result_.merges.size() % 64 == 0) {
        options_.progress("merge", static_cast<int64_t>(result_.merges.size()), total);
      }
    }
  }

 private:
  struct PairState {
    int64_t count = 0;
    std::vector<uint32_t> words;  // that may hold the pair
    bool touched = false;
  };
  struct WordSpan {
    uint64_t offset;
    uint32_t length;
    int64_t count;
  };
  struct Merge {
    int32_t left, right, id;
  };

  void make_alphabet() {
    result_.special_tokens = options_.special_tokens;
    result_.token_bytes = options_.special_tokens;
    result_.pattern = options_.pattern;
    std::array<uint8_t, 256> order{};
    std::iota(order.begin(), order.end(), uint8_t{0});
    std::sort(order.begin(), order.end(),
              [](uint8_t a, uint8_t b) { return byte_characters()[a] < byte_characters()[b]; });
    for (const uint8_t byte : order) {
      byte_ids_[byte] = static_cast<int32_t>(result_.token_bytes.size());
      result_.token_bytes.emplace_back(1, static_cast<char>(byte));
      ids_.emplace(result_.token_bytes.back(), byte_ids_[byte]);
    }
    for (const std::string& token : options_.special_tokens) {
      if (const auto bytes = symbols_to_bytes(token)) ids_.emplace(*bytes, kNoToken);
    }
  }

  void load_words(const WordCounter& words) {
    for (const WordCounter::Word& word : words.words()) {
      if (word.length < 2) continue;
      const auto index = static_cast<uint32_t>(spans_.size());
      spans_.push_back({symbols_.size(), word.length, word.count});
      for (const char c : words.bytes_of(word)) {
        symbols_.push_back(byte_ids_[static_cast<uint8_t>(c)]);
      }
      const int32_t* const first = symbols_.data() + spans_.back().offset;
      for (uint32_t i = 0; i + 1 < word.length; ++i) add(first[i], first[i + 1], word.count, index);
    }
    for (uint32_t pair = 0; pair < pairs_.size(); ++pair) {
      pairs_[pair].touched = false;
      push(pair);
    }
    touched_.clear();
  }

  uint32_t pair_of(int32_t left, int32_t right) {
    const uint32_t number = numbers_.number_of(
        static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right));
    if (number == pairs_.size()) pairs_.emplace_back();
    return number;
  }

  void add(int32_t left, int32_t right, int64_t count, uint32_t word) {
    const uint32_t number = pair_of(left, right);
    PairState& pair = pairs_[number];
    pair.count += count;
    if (pair.words.empty() || pair.words.back() != word) pair.words.push_back(word);
    if (!pair.touched) {
      pair.touched = true;
      touched_.push_back(number);
    }
  }
  void subtract(int32_t left, int32_t right, int64_t count) {
    pairs_[pair_of(left, right)].count -= count;
  }

  void push(uint32_t pair) {
    if (pairs_[pair].count >= options_.min_count) {
      heap_.push({pairs_[pair].count, numbers_.key_of(pair), pair});
    }
  }

  std::optional<HeapEntry> take_best() {
    while (!heap_.empty()) {
      const HeapEntry top = heap_.top();
      heap_.pop();
      const int64_t now = pairs_[top.pair].count;
      if (now == top.count) return top;
      // A count that grew was pushed when it did; one that fell takes its new place.
      if (now < top.count) push(top.pair);
    }
    return std::nullopt;
  }

  // Two ways to build the same bytes share one id; what spells a special token is never built.
  std::optional<int32_t> id_of_merge(int32_t left, int32_t right) {
    std::string bytes = result_.token_bytes[static_cast<size_t>(left)] +
                        result_.token_bytes[static_cast<size_t>(right)];
    const auto next = static_cast<int32_t>(result_.token_bytes.size());
    const auto [known, is_new] = ids_.emplace(bytes, next);
    if (is_new) result_.token_bytes.push_back(std::move(bytes));
    if (known->second == kNoToken) return std::nullopt;
    return known->second;
  }

  void merge_everywhere(uint32_t number, const Merge& merge) {
    const std::vector<uint32_t> words = std::move(pairs_[number].words);
    pairs_[number].words.clear();
    for (const uint32_t word : words) merge_word(word, merge);
    pairs_[number].count = 0;
    for (const uint32_t pair : touched_) {
      pairs_[pair].touched = false;
      push(pair);
    }
    touched_.clear();
  }

  void merge_word(uint32_t index, const Merge& merge) {
    WordSpan& span = spans_[index];
    int32_t* const symbols = symbols_.data() + span.offset;
    uint32_t out = 0;
    for (uint32_t in = 0; in < span.length; ++in) {
      const bool here =
          symbols[in] == merge.left && in + 1 < span.length && symbols[in + 1] == merge.right;
      if (!here) {
        symbols[out++] = symbols[in];
        continue;
      }
      if (out > 0) {
        subtract(symbols[out - 1], merge.left, span.count);
        add(symbols[out - 1], merge.id, span.count, index);
      }
      ++in;
      if (in + 1 < span.length) {
        subtract(merge.right, symbols[in + 1], span.count);
        add(merge.id, symbols[in + 1], span.count, index);
      }
      symbols[out++] = merge.id;
    }
    span.length = out;
  }

  const BpeTrainerOptions& options_;
  BpeTrainerResult& result_;
  std::array<int32_t, 256> byte_ids_{};
  StringMap<int32_t> ids_;  // token bytes -> id; kNoToken = reserved by a special token
  std::vector<int32_t> symbols_;
  std::vector<WordSpan> spans_;
  PairNumbers numbers_;
  std::vector<PairState> pairs_;
  std::vector<uint32_t> touched_;
  std::priority_queue<HeapEntry> heap_;
};

}  // namespace

BpeTrainerResult train_bpe(const NextText& next, const BpeTrainerOptions& options) {
  check_options(options);
  const CorpusCounts counts = count_words(next, options);
  BpeTrainerResult result;
  result.corpus_bytes = counts.bytes;
  result.corpus_pieces = counts.pieces;
  result.distinct_pieces = static_cast<int64_t>(counts.words.words().size());
  MergeLearner(counts.words, options, result).run();
  return result;
}

BpeTrainerResult train_bpe(std::span<const Source> sources, const DocumentOptions& documents,
                           const BpeTrainerOptions& options) {
  return train_bpe(read_sources(sources, documents), options);
}

}  // namespace capstan::text
