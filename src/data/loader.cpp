// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/data/loader.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "capstan/base/check.h"
#include "capstan/base/error.h"
#include "capstan/base/hash.h"
#include "capstan/base/trace.h"
#include "capstan/data/provenance.h"
#include "data/loader_internal.h"

namespace capstan::data {
namespace {

std::vector<std::unique_ptr<RowSpace>> open_rows(const DataOptions& options) {
  if (options.train.empty()) {
    throw ConfigError(ErrorText{.module = "data",
                                .what = "opening data.train",
                                .got = "no source",
                                .need = "at least one {path, weight}"});
  }
  std::vector<std::unique_ptr<RowSpace>> rows;
  for (const TrainSource& source : options.train) {
    rows.push_back(
        std::make_unique<RowSpace>(open_tokens(source.path, options.tokenizer_fingerprint),
                                   options.sequence_length, options.documents, false));
  }
  return rows;
}

SampleOrder make_order(const DataOptions& options,
                       const std::vector<std::unique_ptr<RowSpace>>& rows) {
  std::vector<SourceSize> sizes;
  for (size_t i = 0; i < rows.size(); ++i)
    sizes.push_back({rows[i]->rows(), options.train[i].weight});
  return SampleOrder(std::move(sizes), options.seed, options.shuffle);
}

}  // namespace

std::shared_ptr<const TokenFile> open_tokens(const std::string& path,
                                             const std::string& fingerprint) {
  auto file = std::make_shared<const TokenFile>(path);
  const auto provenance = read_provenance(*file);
  if (provenance && !fingerprint.empty() && provenance->tokenizer_fingerprint != fingerprint) {
    throw ConfigError(
        ErrorText{.module = "data",
                  .what = fmt::format("opening {}", path),
                  .got = fmt::format("tokens of tokenizer {}", provenance->tokenizer_fingerprint),
                  .need = fmt::format("those of {}", fingerprint),
                  .why = "the recipe's tokenizer is not the one that made the file",
                  .fix = "Prepare the text again with data.tokenizer, or name the right one"});
  }
  return file;
}

void read_row(const RowSpace& space, int64_t row, int64_t vocab_size, const RowSpans& out) {
  space.read(row, out);
  if (vocab_size == 0) return;
  const auto check = [&](std::span<const int64_t> ids, int64_t offset, bool may_ignore) {
    const auto is_bad = [&](int64_t id) {
      return id >= vocab_size || (id < 0 && !(may_ignore && id == kIgnoreTarget));
    };
    const auto where = std::find_if(ids.begin(), ids.end(), is_bad);
    if (where == ids.end()) return;
    throw DataError(
        ErrorText{.module = "data",
                  .what = fmt::format("reading {}", bin_path(space.file().prefix()).string()),
                  .got = fmt::format("token id {} at token {}", *where,
                                     space.inputs(row).first + (where - ids.begin()) + offset),
                  .need = fmt::format("0 to {}", vocab_size - 1),
                  .why = "the vocabulary of the model ends there",
                  .fix = "Prepare the text again with the model's tokenizer"});
  };
  check(out.tokens, 0, false);
  check(out.targets, 1, true);
}

DataOptions make_data_options(const recipe::Recipe& recipe, std::string tokenizer_fingerprint) {
  DataOptions options;
  for (const recipe::TrainSource& source : recipe.data.train)
    options.train.push_back({source.path, source.weight});
  options.sequence_length = recipe.batch.sequence_length;
  options.shuffle = recipe.data.shuffle;
  options.documents = parse_documents(recipe.data.documents);
  options.seed = static_cast<uint64_t>(recipe.run.seed);
  options.vocab_size = recipe.model.vocab_size.value_or(0);
  options.tokenizer_fingerprint = std::move(tokenizer_fingerprint);
  return options;
}

int64_t SampleBatch::target_tokens() const {
  return std::count_if(targets.begin(), targets.end(),
                       [](int64_t target) { return target != kIgnoreTarget; });
}

RowSpans SampleBatch::row(int64_t sample) {
  CAPSTAN_CHECK(sample >= 0 && sample < samples, "sample {} of {}", sample, samples);
  const auto cut = [&](std::vector<int64_t>& values) {
    return std::span<int64_t>(values).subspan(static_cast<size_t>(sample * length),
                                              static_cast<size_t>(length));
  };
  return {cut(tokens), cut(targets), cut(positions), cut(document_ids)};
}

SampleBatch make_batch(int64_t samples, int64_t length) {
  SampleBatch batch{.samples = samples, .length = length};
  const auto rows = static_cast<size_t>(samples), size = static_cast<size_t>(samples * length);
  for (auto* values : {&batch.tokens, &batch.targets, &batch.positions, &batch.document_ids})
    values->resize(size);
  batch.global_sample.assign(rows, -1);
  batch.epoch.assign(rows, 0);
  batch.valid.assign(rows, 0);
  return batch;
}

std::string DataFingerprint::text() const {
  std::string lines;
  for (size_t i = 0; i < sources.size(); ++i)
    lines += fmt::format("data.train[{}]: {}\n", i, sources[i]);
  lines += fmt::format("data.tokenizer: {}\n", tokenizer);
  lines += fmt::format("batch.sequence_length: {}\n", sequence_length);
  lines += fmt::format("data.shuffle: {}\n", shuffle);
  lines += fmt::format("data.documents: {}\n", documents);
  return lines;
}

std::string DataFingerprint::hex() const { return xxh3_128_hex(text()); }

TrainLoader::TrainLoader(DataOptions options)
    : options_(std::move(options)),
      rows_(open_rows(options_)),
      order_(make_order(options_, rows_)) {}

SampleBatch TrainLoader::read(int64_t first_sample, int64_t count) const {
  return read_padded({first_sample, count}, count);
}

SampleBatch TrainLoader::read_padded(SampleRange range, int64_t padded_count) const {
  CAPSTAN_CHECK(range.first >= 0 && range.count >= 0 && padded_count >= range.count,
                "samples {} + {} padded to {}", range.first, range.count, padded_count);
  const trace::Span span("data", "read");
  SampleBatch batch = make_batch(padded_count, options_.sequence_length);
  std::vector<bool> is_checked(rows_.size(), false);
  for (int64_t i = 0; i < padded_count; ++i) {
    const auto at = static_cast<size_t>(i);
    if (i >= range.count) {
      RowSpace::pad(batch.row(i), 0, options_.documents);
      continue;
    }
    const SampleOrder::Place place = order_(range.first + i);
    const auto source = static_cast<size_t>(place.source);
    if (!is_checked[source]) rows_[source]->file().check_unchanged();
    is_checked[source] = true;
    read_row(*rows_[source], place.row, options_.vocab_size, batch.row(i));
    batch.global_sample[at] = range.first + i;
    batch.epoch[at] = place.epoch;
    batch.valid[at] = 1;
  }
  return batch;
}

int64_t TrainLoader::tokens() const {
  int64_t sum = 0;
  for (const auto& rows : rows_) sum += rows->file().tokens();
  return sum;
}

DataFingerprint TrainLoader::fingerprint() const {
  DataFingerprint print{
      .tokenizer = options_.tokenizer_fingerprint,
      .sequence_length = options_.sequence_length,
      .shuffle = options_.shuffle,
      .documents = options_.documents == Documents::kJoined ? "joined" : "separate"};
  for (size_t i = 0; i < rows_.size(); ++i) {
    print.sources.push_back(
        fmt::format("{} weight {}", rows_[i]->file().content_hash(), options_.train[i].weight));
  }
  return print;
}

}  // namespace capstan::data
