// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/data/inspect.h"

#include <fmt/format.h>

#include <algorithm>
#include <vector>

#include "capstan/base/error.h"

namespace capstan::data {
namespace {

constexpr int64_t kBlockTokens = int64_t{1} << 16;

void measure_documents(const TokenFile& file, InspectReport& report) {
  std::vector<int64_t> sizes(static_cast<size_t>(file.documents()));
  for (int64_t i = 0; i < file.documents(); ++i)
    sizes[static_cast<size_t>(i)] = file.document(i).size();
  report.empty_documents = std::count(sizes.begin(), sizes.end(), 0);
  const auto middle = sizes.begin() + std::ssize(sizes) / 2;
  std::nth_element(sizes.begin(), middle, sizes.end());
  report.median = *middle;
  const auto [least, most] = std::minmax_element(sizes.begin(), sizes.end());
  report.shortest = *least;
  report.longest = *most;
}

void check_tokens(const TokenFile& file, int64_t vocab_size, InspectReport& report) {
  std::vector<int64_t> block(static_cast<size_t>(std::min(kBlockTokens, file.tokens())));
  for (int64_t first = 0; first < file.tokens(); first += kBlockTokens) {
    const auto ids =
        std::span(block).first(static_cast<size_t>(std::min(kBlockTokens, file.tokens() - first)));
    file.read(first, ids);
    for (size_t i = 0; i < ids.size(); ++i) {
      report.largest_token = std::max(report.largest_token, ids[i]);
      if (ids[i] >= 0 && (vocab_size == 0 || ids[i] < vocab_size)) continue;
      const int64_t token = first + static_cast<int64_t>(i);
      throw DataError(
          ErrorText{.module = "data",
                    .what = fmt::format("checking {}", bin_path(file.prefix()).string()),
                    .got = fmt::format("token id {} at token {}, document {}", ids[i], token,
                                       file.document_at(token)),
                    .need = vocab_size == 0 ? "0 or more" : fmt::format("0 to {}", vocab_size - 1),
                    .why = "the vocabulary ends there",
                    .fix = "Name the tokenizer that made the file, or prepare it again"});
    }
  }
}

void check_hash(const Path& path, const std::string& got, const std::string& need) {
  if (got == need) return;
  throw DataError(
      ErrorText{.module = "data",
                .what = fmt::format("checking {}", path.string()),
                .got = fmt::format("content with hash {}", got),
                .need = need,
                .why = "the .json beside it says so: the file was changed or damaged",
                .fix = "Copy it again or rebuild it with `capstan data prepare --force`"});
}

}  // namespace

InspectReport inspect(const TokenFile& file, int64_t vocab_size) {
  InspectReport report{.documents = file.documents(),
                       .sequences = file.sequences(),
                       .tokens = file.tokens(),
                       .type = file.type(),
                       .bin_bytes = file.tokens() * size_of(file.type()),
                       .idx_bytes = file.idx_bytes(),
                       .content_hash = file.content_hash(),
                       .provenance = read_provenance(file)};
  measure_documents(file, report);
  if (report.provenance) {
    check_hash(bin_path(file.prefix()), file.full_bin_hash(), report.provenance->pair.bin_xxh3);
    check_hash(idx_path(file.prefix()), file.full_idx_hash(), report.provenance->pair.idx_xxh3);
    if (vocab_size == 0) vocab_size = report.provenance->vocab_size;
  }
  check_tokens(file, vocab_size, report);
  return report;
}

}  // namespace capstan::data
