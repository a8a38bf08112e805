// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/data/validation.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "capstan/base/check.h"
#include "capstan/base/error.h"
#include "data/loader_internal.h"

namespace capstan::data {
namespace {

constexpr int64_t kBlockTokens = int64_t{1} << 16;

// a * b / c without overflow of the product.
int64_t scale(int64_t a, int64_t b, int64_t c) {
  __extension__ using Wide = __int128;
  return static_cast<int64_t>(static_cast<Wide>(a) * b / c);
}

}  // namespace

ValidationSet::ValidationSet(ValidationOptions options) : options_(std::move(options)) {
  auto file = open_tokens(options_.path, options_.tokenizer_fingerprint);
  provenance_ = read_provenance(*file);
  rows_ = std::make_unique<RowSpace>(std::move(file), options_.sequence_length, options_.documents,
                                     true);
}

std::vector<int64_t> ValidationSet::choose_rows(std::optional<int64_t> samples) const {
  const int64_t count = std::min(samples.value_or(rows()), rows());
  CAPSTAN_CHECK(count > 0, "{} samples", count);
  std::vector<int64_t> chosen(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) chosen[static_cast<size_t>(i)] = scale(i, rows(), count);
  return chosen;
}

SampleBatch ValidationSet::read(std::span<const int64_t> numbers) const {
  rows_->file().check_unchanged();
  SampleBatch batch = make_batch(std::ssize(numbers), options_.sequence_length);
  for (size_t i = 0; i < numbers.size(); ++i) {
    const RowSpans out = batch.row(static_cast<int64_t>(i));
    if (numbers[i] < 0 || numbers[i] >= rows()) {
      RowSpace::pad(out, 0, options_.documents);
      continue;
    }
    read_row(*rows_, numbers[i], options_.vocab_size, out);
    batch.global_sample[i] = numbers[i];
    batch.valid[i] = 1;
  }
  return batch;
}

SampleBatch ValidationSet::read(int64_t first, int64_t count) const {
  std::vector<int64_t> numbers(static_cast<size_t>(count));
  std::iota(numbers.begin(), numbers.end(), first);
  return read(numbers);
}

std::optional<double> ValidationSet::bytes_per_token() const {
  if (!provenance_ || provenance_->text_bytes == 0) return std::nullopt;
  return static_cast<double>(provenance_->text_bytes) /
         static_cast<double>(provenance_->pair.tokens);
}

UnigramModel::UnigramModel(int64_t vocab_size) : counts_(static_cast<size_t>(vocab_size)) {
  CAPSTAN_CHECK(vocab_size > 0, "a vocabulary of {}", vocab_size);
}

void UnigramModel::add(const TokenFile& file) {
  std::vector<int64_t> block(static_cast<size_t>(std::min(kBlockTokens, file.tokens())));
  for (int64_t first = 0; first < file.tokens(); first += kBlockTokens) {
    const auto count = static_cast<size_t>(std::min(kBlockTokens, file.tokens() - first));
    const std::span<int64_t> ids = std::span(block).first(count);
    file.read(first, ids);
    for (const int64_t id : ids) {
      if (id < 0 || id >= std::ssize(counts_)) {
        throw DataError(
            ErrorText{.module = "data",
                      .what = fmt::format("counting {}", bin_path(file.prefix()).string()),
                      .got = fmt::format("token id {}", id),
                      .need = fmt::format("0 to {}", counts_.size() - 1)});
      }
      ++counts_[static_cast<size_t>(id)];
    }
  }
  total_ += file.tokens();
}

double UnigramModel::nats(int64_t token) const {
  const auto count = static_cast<double>(counts_.at(static_cast<size_t>(token)));
  return std::log(static_cast<double>(total_) + static_cast<double>(counts_.size())) -
         std::log(count + 1);
}

UnigramScore score_unigram(const UnigramModel& model, const ValidationSet& set,
                           std::span<const int64_t> rows) {
  UnigramScore score;
  double sum = 0;
  for (const int64_t row : rows) {
    const SampleBatch batch = set.read(std::span(&row, 1));
    for (const int64_t target : batch.targets) {
      if (target == kIgnoreTarget) continue;
      sum += model.nats(target);
      ++score.target_tokens;
    }
  }
  if (score.target_tokens > 0) score.loss = sum / static_cast<double>(score.target_tokens);
  return score;
}

double unigram_loss(const TokenFile& train, const ValidationSet& validation, int64_t vocab_size,
                    std::optional<int64_t> samples) {
  UnigramModel model(vocab_size);
  model.add(train);
  return score_unigram(model, validation, validation.choose_rows(samples)).loss;
}

}  // namespace capstan::data
