// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <condition_variable>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "capstan/base/error.h"
#include "data/prepare_internal.h"

namespace capstan::data {
namespace {

struct Raw {
  std::string key, text;
};

// A run of documents. Failures travel as chunks too, so they surface in source order.
struct Chunk {
  int64_t number = 0, bytes = 0;
  std::vector<Raw> raw;
  std::vector<EncodedDocument> encoded;
  std::exception_ptr failure;  // raised behind the last encoded document
  bool is_last = false;
};

class Pipeline {
 public:
  Pipeline(const PipelineOptions& options, const std::function<void(EncodedDocument&&)>& take)
      : options_(options), take_(take) {}
  ~Pipeline() { stop(); }
  Pipeline(const Pipeline&) = delete;
  Pipeline& operator=(const Pipeline&) = delete;

  text::DocumentCounts run() {
    threads_.emplace_back([this] { read_all(); });
    for (int i = 0; i < options_.workers; ++i) threads_.emplace_back([this] { encode_all(); });
    take_all();
    stop();
    return counts_;
  }

 private:
  void read_all() {
    Chunk chunk;
    try {
      for (const text::Source& source : options_.sources) {
        if (!read_source(source, chunk)) return;
      }
    } catch (...) {
      chunk.failure = std::current_exception();
    }
    chunk.is_last = true;
    submit(chunk);
  }

  // False when the consumer has given up.
  bool read_source(const text::Source& source, Chunk& chunk) {
    text::DocumentReader reader(source, options_.documents);
    const bool has_lines = text::is_jsonl(source);
    std::string text;
    while (reader.next(text)) {
      std::string key =
          has_lines ? fmt::format("{}:{}", source.relative, reader.line()) : source.relative;
      // What a document costs besides its text counts too, or millions of tiny ones would escape
      // the limit.
      chunk.bytes += static_cast<int64_t>(text.size() + key.size() + sizeof(EncodedDocument));
      chunk.raw.push_back({std::move(key), std::move(text)});
      text = std::string();
      if (chunk.bytes >= options_.chunk_bytes && !submit(chunk)) return false;
    }
    add_counts(reader.counts());
    return true;
  }

  void add_counts(const text::DocumentCounts& counts) {
    const std::lock_guard lock(mutex_);
    counts_.documents += counts.documents;
    counts_.bytes += counts.bytes;
    counts_.bad_lines += counts.bad_lines;
    if (counts_.first_bad_line.empty()) counts_.first_bad_line = counts.first_bad_line;
  }

  bool submit(Chunk& chunk) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] {
      return is_stopping_ || in_flight_ == 0 ||
             in_flight_ + chunk.bytes <= options_.in_flight_bytes;
    });
    if (is_stopping_) return false;
    in_flight_ += chunk.bytes;
    chunk.number = submitted_++;
    to_encode_.push_back(std::exchange(chunk, Chunk{}));
    changed_.notify_all();
    return true;
  }

  void encode_all() {
    for (;;) {
      Chunk chunk;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return is_stopping_ || !to_encode_.empty(); });
        if (is_stopping_) return;
        chunk = std::move(to_encode_.front());
        to_encode_.pop_front();
      }
      encode(chunk);
      const std::lock_guard lock(mutex_);
      const int64_t number = chunk.number;
      done_.emplace(number, std::move(chunk));
      changed_.notify_all();
    }
  }

  void encode(Chunk& chunk) const {
    std::string current;
    try {
      for (Raw& raw : chunk.raw) {
        current = raw.key;
        EncodedDocument document{std::move(raw.key), static_cast<int64_t>(raw.text.size()),
                                 options_.encode(raw.text)};
        document.tokens.push_back(options_.eos_id);
        raw.text = std::string();
        chunk.encoded.push_back(std::move(document));
      }
    } catch (const DataError& error) {
      ErrorText text = error.text();
      text.what = text.what.empty() ? current : fmt::format("{}: {}", current, text.what);
      chunk.failure = std::make_exception_ptr(DataError(std::move(text)));
    } catch (...) {
      chunk.failure = std::current_exception();
    }
    chunk.raw.clear();
  }

  void take_all() {
    for (int64_t number = 0;; ++number) {
      Chunk chunk;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return done_.contains(number); });
        auto node = done_.extract(number);
        chunk = std::move(node.mapped());
      }
      for (EncodedDocument& document : chunk.encoded) take_(std::move(document));
      if (chunk.failure) std::rethrow_exception(chunk.failure);
      {
        const std::lock_guard lock(mutex_);
        in_flight_ -= chunk.bytes;
      }
      changed_.notify_all();
      if (chunk.is_last) return;
    }
  }

  void stop() {
    {
      const std::lock_guard lock(mutex_);
      is_stopping_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }

  const PipelineOptions& options_;
  const std::function<void(EncodedDocument&&)>& take_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Chunk> to_encode_;
  std::map<int64_t, Chunk> done_;
  int64_t in_flight_ = 0, submitted_ = 0;
  bool is_stopping_ = false;
  text::DocumentCounts counts_;
  std::vector<std::thread> threads_;
};

}  // namespace

text::DocumentCounts run_pipeline(const PipelineOptions& options,
                                  const std::function<void(EncodedDocument&&)>& take) {
  return Pipeline(options, take).run();
}

}  // namespace capstan::data
