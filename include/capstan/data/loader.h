// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Samples for training. A sample is named by its global number since the start of the run; position
// in the data is that number and nothing else, so every rank count and every resume sees the same
// samples in the same order.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "capstan/data/order.h"
#include "capstan/data/rows.h"
#include "capstan/recipe/recipe.h"

namespace capstan::data {

// Rows of equal length, row-major [samples x length]. `valid` is 0 for rows that only fill up a
// batch: all their targets are kIgnoreTarget, so they weigh nothing.
struct SampleBatch {
  int64_t samples = 0, length = 0;
  std::vector<int64_t> tokens, targets, positions, document_ids;  // see RowSpace::read
  std::vector<int64_t> global_sample;                             // [samples]; -1 for filling rows
  std::vector<int64_t> epoch;                                     // [samples]
  std::vector<uint8_t> valid;                                     // [samples]
  [[nodiscard]] int64_t target_tokens() const;                    // targets that count
  [[nodiscard]] RowSpans row(int64_t sample);
};
[[nodiscard]] SampleBatch make_batch(int64_t samples, int64_t length);

struct TrainSource {
  std::string path;  // prefix of a .bin/.idx pair
  double weight = 1;
};

struct DataOptions {
  std::vector<TrainSource> train;
  int64_t sequence_length = 0;
  bool shuffle = true;
  Documents documents = Documents::kJoined;
  uint64_t seed = 0;
  int64_t vocab_size = 0;  // ids at or above it are refused; 0 = not checked
  std::string
      tokenizer_fingerprint;  // refused when PREFIX.json names another one; empty = not checked
};

// The options that a resolved recipe asks for.
[[nodiscard]] DataOptions make_data_options(const recipe::Recipe& recipe,
                                            std::string tokenizer_fingerprint);

// What decides the content of every sample besides the seed. Stored in checkpoints; equal text =
// equal samples.
struct DataFingerprint {
  std::vector<std::string> sources;  // content hash of each file, in order, with its weight
  std::string tokenizer;
  int64_t sequence_length = 0;
  bool shuffle = true;
  std::string documents;
  [[nodiscard]] std::string text() const;  // one line per part, for messages about differences
  [[nodiscard]] std::string hex() const;   // XXH3-128 of text()
};

// Thread-safe after construction.
class TrainLoader {
 public:
  // Opens and checks every file. ConfigError: no source, missing pair, wrong tokenizer, shorter
  // than one row.
  explicit TrainLoader(DataOptions options);
  // Samples [first, first + count) of the run. Throws DataError when a file changed or an id is too
  // large.
  [[nodiscard]] SampleBatch read(int64_t first_sample, int64_t count) const;
  // As above, filled up with rows that weigh nothing to `padded_count`.
  [[nodiscard]] SampleBatch read_padded(SampleRange range, int64_t padded_count) const;
  [[nodiscard]] SampleOrder::Place place_of(int64_t sample) const { return order_(sample); }
  [[nodiscard]] int64_t rows() const { return order_.rows(); }
  [[nodiscard]] int64_t tokens() const;  // of all sources
  [[nodiscard]] const RowSpace& source(int64_t index) const {
    return *rows_[static_cast<size_t>(index)];
  }
  [[nodiscard]] int64_t sources() const { return static_cast<int64_t>(rows_.size()); }
  [[nodiscard]] DataFingerprint fingerprint() const;

 private:
  DataOptions options_;
  std::vector<std::unique_ptr<RowSpace>> rows_;
  SampleOrder order_;
};

}  // namespace capstan::data
