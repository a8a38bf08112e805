// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/data/rows.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "capstan/base/bytes.h"
#include "capstan/base/check.h"
#include "capstan/base/error.h"

namespace capstan::data {

Documents parse_documents(std::string_view name) {
  if (name == "joined") return Documents::kJoined;
  if (name == "separate") return Documents::kSeparate;
  throw ConfigError(ErrorText{.module = "data",
                              .what = "reading data.documents",
                              .got = std::string(name),
                              .need = "joined or separate"});
}

RowSpace::RowSpace(std::shared_ptr<const TokenFile> file, int64_t sequence_length,
                   Documents documents, bool keep_last)
    : file_(std::move(file)), length_(sequence_length), documents_(documents) {
  CAPSTAN_CHECK(length_ > 0, "sequence length {}", length_);
  const int64_t targets = file_->tokens() - 1;
  rows_ = keep_last ? targets / length_ + (targets % length_ != 0 ? 1 : 0) : targets / length_;
  if (rows_ > 0) return;
  const int64_t need = keep_last ? 2 : length_ + 1;
  throw ConfigError(ErrorText{
      .module = "data",
      .what = fmt::format("cutting {} into sequences", file_->prefix().string()),
      .got = fmt::format("{} tokens", format_count(file_->tokens())),
      .need = fmt::format("at least {}", format_count(need)),
      .why = keep_last ? "one input and one target"
                       : "batch.sequence_length inputs and one more target",
      .fix = keep_last ? "Prepare more text" : "Prepare more text or lower batch.sequence_length"});
}

TokenRange RowSpace::inputs(int64_t row) const {
  CAPSTAN_CHECK(row >= 0 && row < rows_, "row {} of {}", row, rows_);
  const int64_t first = row * length_;
  return {first, std::min(first + length_, file_->tokens() - 1)};
}

void RowSpace::read(int64_t row, const RowSpans& out) const {
  const TokenRange range = inputs(row);
  const auto count = static_cast<size_t>(range.size());
  file_->read(range.first, out.tokens.first(count));
  file_->read(range.first + 1, out.targets.first(count));
  if (documents_ == Documents::kSeparate) {
    mark_documents(range, out);
  } else {
    for (size_t i = 0; i < count; ++i) out.positions[i] = static_cast<int64_t>(i);
    std::fill_n(out.document_ids.begin(), count, 0);
  }
  pad(out, count, documents_);
}

void RowSpace::mark_documents(TokenRange range, const RowSpans& out) const {
  int64_t document = file_->document_at(range.first);
  int64_t end = file_->document(document).last, position = 0;
  for (int64_t token = range.first; token < range.last; ++token, ++position) {
    if (token == end) {
      document = file_->document_at(token);  // not simply the next one: that may be empty
      end = file_->document(document).last;
      position = 0;
    }
    const auto i = static_cast<size_t>(token - range.first);
    out.positions[i] = position;
    out.document_ids[i] = document;
    if (token + 1 == end) out.targets[i] = kIgnoreTarget;
  }
}

void RowSpace::pad(const RowSpans& out, size_t begin, Documents documents) {
  const bool is_separate = documents == Documents::kSeparate;
  for (size_t i = begin; i < out.tokens.size(); ++i) {
    out.tokens[i] = 0;
    out.targets[i] = kIgnoreTarget;
    out.positions[i] = static_cast<int64_t>(is_separate ? i - begin : i);
    out.document_ids[i] = is_separate ? -1 : 0;
  }
}

}  // namespace capstan::data
