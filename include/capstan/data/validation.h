// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Held-out sets, read in file order, and the unigram model they are measured against.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "capstan/data/loader.h"
#include "capstan/data/provenance.h"

namespace capstan::data {

struct ValidationOptions {
  std::string name;
  std::string path;  // prefix of a .bin/.idx pair
  int64_t sequence_length = 0;
  Documents documents = Documents::kJoined;
  int64_t vocab_size = 0;
  std::string tokenizer_fingerprint;
};

// Thread-safe after construction. The last row may be incomplete; it is padded with targets that
// weigh nothing.
class ValidationSet {
 public:
  explicit ValidationSet(ValidationOptions options);
  [[nodiscard]] const std::string& name() const { return options_.name; }
  [[nodiscard]] int64_t rows() const { return rows_->rows(); }
  [[nodiscard]] const RowSpace& row_space() const { return *rows_; }
  // The rows that an evaluation of `samples` sequences uses: spread evenly over the set, in order;
  // all rows without a value or when the set has no more.
  [[nodiscard]] std::vector<int64_t> choose_rows(std::optional<int64_t> samples) const;
  // Numbers outside [0, rows()) give filling rows. global_sample is the row number.
  [[nodiscard]] SampleBatch read(std::span<const int64_t> rows) const;
  [[nodiscard]] SampleBatch read(int64_t first, int64_t count) const;
  // Bytes of text per token, end-of-document tokens included, from PREFIX.json.
  // bits per byte = loss / ln 2 / this.
  [[nodiscard]] std::optional<double> bytes_per_token() const;

 private:
  ValidationOptions options_;
  std::unique_ptr<RowSpace> rows_;
  std::optional<Provenance> provenance_;
};

// Add-one smoothed token frequencies: p(t) = (count(t) + 1) / (total + vocabulary).
class UnigramModel {
 public:
  explicit UnigramModel(int64_t vocab_size);
  void add(const TokenFile& file);                 // DataError for an id outside the vocabulary
  [[nodiscard]] double nats(int64_t token) const;  // -ln p
  [[nodiscard]] int64_t total() const { return total_; }

 private:
  std::vector<int64_t> counts_;
  int64_t total_ = 0;
};

struct UnigramScore {
  double loss = 0;  // nats per target token
  int64_t target_tokens = 0;
};
// Mean over exactly the target tokens of the given rows of the set.
[[nodiscard]] UnigramScore score_unigram(const UnigramModel& model, const ValidationSet& set,
                                         std::span<const int64_t> rows);
// Counts `train`, scores the rows that an evaluation of `samples` sequences uses.
[[nodiscard]] double unigram_loss(const TokenFile& train, const ValidationSet& validation,
                                  int64_t vocab_size,
                                  std::optional<int64_t> samples = std::nullopt);

}  // namespace capstan::data
