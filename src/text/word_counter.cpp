// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "text/word_counter.h"

#include <atomic>
#include <exception>
#include <limits>
#include <mutex>
#include <thread>

#include "capstan/base/bytes.h"
#include "capstan/base/env.h"
#include "capstan/base/error.h"
#include "capstan/base/hash.h"
#include "text/scanner.h"
#include "text/unicode.h"

namespace capstan::text {

WordCounter::WordCounter() : slots_(1 << 12, 0) {}

void WordCounter::add(std::string_view word, int64_t count) {
  add_hashed(word, xxh3_64(word), count);
}

void WordCounter::add_hashed(std::string_view word, uint64_t hash, int64_t count) {
  const size_t mask = slots_.size() - 1;
  size_t slot = hash & mask;
  for (; slots_[slot] != 0; slot = (slot + 1) & mask) {
    Word& known = words_[slots_[slot] - 1];
    if (known.hash == hash && bytes_of(known) == word) {
      known.count += count;
      return;
    }
  }
  if (words_.size() >= std::numeric_limits<uint32_t>::max() - 1) {
    throw ConfigError({.module = "text", .what = "counting pieces", .got = "over 4 billion"});
  }
  words_.push_back({hash, arena_.size(), count, static_cast<uint32_t>(word.size())});
  arena_.append(word);
  slots_[slot] = static_cast<uint32_t>(words_.size());
  if (words_.size() * 2 > slots_.size()) grow();
}

void WordCounter::grow() {
  slots_.assign(slots_.size() * 2, 0);
  const size_t mask = slots_.size() - 1;
  for (size_t i = 0; i < words_.size(); ++i) {
    size_t slot = words_[i].hash & mask;
    while (slots_[slot] != 0) slot = (slot + 1) & mask;
    slots_[slot] = static_cast<uint32_t>(i + 1);
  }
}

void WordCounter::add_all(const WordCounter& other) {
  for (const Word& word : other.words_) add_hashed(other.bytes_of(word), word.hash, word.count);
}

int64_t WordCounter::memory_bytes() const {
  return static_cast<int64_t>(arena_.capacity() + words_.capacity() * sizeof(Word) +
                              slots_.size() * sizeof(uint32_t));
}

namespace {

void count_valid(std::string_view text, Scan scan, CorpusCounts& counts) {
  while (!text.empty()) {
    const size_t length = scan(text);
    ++counts.pieces;
    for (size_t at = 0; at < length;) {
      size_t part = std::min(kLongPiece, length - at);
      // Never inside a character.
      while (at + part < length && (static_cast<uint8_t>(text[at + part]) & 0xc0) == 0x80) --part;
      counts.words.add(text.substr(at, part));
      at += part;
    }
    text.remove_prefix(length);
  }
}

void count_text(std::string_view text, Scan scan, CorpusCounts& counts) {
  counts.bytes += static_cast<int64_t>(text.size());
  while (!text.empty()) {
    const size_t valid = valid_prefix(text);
    count_valid(text.substr(0, valid), scan, counts);
    // Ill-formed bytes are pieces of one byte, which have nothing to merge.
    text.remove_prefix(std::min(text.size(), valid + 1));
  }
}

// The state that the counting threads share.
class SharedCount {
 public:
  SharedCount(const NextText& next, const BpeTrainerOptions& options)
      : feed_(next), options_(options), scan_(scanner_of(options.pattern)) {}

  void work(CorpusCounts& counts) {
    try {
      std::string chunk;
      int64_t charged = 0;
      while (take(chunk)) {
        count_text(chunk, scan_, counts);
        const int64_t memory = counts.words.memory_bytes();
        charge(memory - charged);
        charged = memory;
      }
    } catch (...) {
      const std::lock_guard lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
      stopped_ = true;
    }
  }
  void rethrow() const {
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  bool take(std::string& chunk) {
    const std::lock_guard lock(mutex_);
    if (stopped_ || !feed_.next(chunk)) return false;
    bytes_ += static_cast<int64_t>(chunk.size());
    if (options_.progress) options_.progress("count", bytes_, 0);
    return true;
  }
  void charge(int64_t bytes) {
    if (memory_.fetch_add(bytes) + bytes <= options_.max_word_bytes) return;
    throw ConfigError({.module = "text",
                       .what = "counting the distinct pieces of the corpus",
                       .got = "more than " + format_bytes(options_.max_word_bytes) + " of memory",
                       .need = "a corpus whose distinct pieces fit",
                       .fix = "Train on a part of the corpus; a few GB of text are plenty"});
  }

  CorpusFeed feed_;
  const BpeTrainerOptions& options_;
  Scan scan_;
  std::mutex mutex_;
  std::exception_ptr failure_;
  bool stopped_ = false;
  int64_t bytes_ = 0;
  std::atomic<int64_t> memory_{0};
};

}  // namespace

CorpusCounts count_words(const NextText& next, const BpeTrainerOptions& options) {
  const int threads = options.threads > 0 ? options.threads : allowed_cpus();
  SharedCount shared(next, options);
  std::vector<CorpusCounts> counts(static_cast<size_t>(threads));
  std::vector<std::thread> workers;
  for (size_t i = 1; i < counts.size(); ++i) {
    workers.emplace_back([&shared, &counts, i] { shared.work(counts[i]); });
  }
  shared.work(counts[0]);
  for (std::thread& worker : workers) worker.join();
  shared.rethrow();
  CorpusCounts total = std::move(counts[0]);
  for (size_t i = 1; i < counts.size(); ++i) {
    total.words.add_all(counts[i].words);
    total.bytes += counts[i].bytes;
    total.pieces += counts[i].pieces;
    counts[i] = {};
  }
  return total;
}

}  // namespace capstan::text
