// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Rows: the token stream of a file cut into pieces of sequence_length inputs, by arithmetic. Row r
// has the inputs [r L, r L + L) and, one later, the targets [r L + 1, r L + L]; so neighbours share
// one token, every token but the first is a target once, and rows never move when files grow at the
// end.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "capstan/data/token_file.h"

namespace capstan::data {

inline constexpr int64_t kIgnoreTarget = -100;

enum class Documents {
  kJoined,   // attention and positions cross a boundary
  kSeparate  // neither does; the first token of a document is no target
};
[[nodiscard]] Documents parse_documents(std::string_view name);  // "joined" | "separate"

// Where one row is written; each span has `sequence_length` elements.
struct RowSpans {
  std::span<int64_t> tokens, targets, positions, document_ids;
};

class RowSpace {
 public:
  // `keep_last`: an incomplete last row counts and is padded (validation); otherwise it is dropped
  // (training).
  RowSpace(std::shared_ptr<const TokenFile> file, int64_t sequence_length, Documents documents,
           bool keep_last);
  [[nodiscard]] int64_t rows() const { return rows_; }
  [[nodiscard]] int64_t sequence_length() const { return length_; }
  [[nodiscard]] const TokenFile& file() const { return *file_; }
  [[nodiscard]] TokenRange inputs(int64_t row) const;  // within the file
  // Joined: positions 0..L-1, document ids all 0. Separate: positions restart at each document and
  // at the row, ids are those of the file. Padding: token 0, target kIgnoreTarget, in separate mode
  // document -1.
  void read(int64_t row, const RowSpans& out) const;
  static void pad(const RowSpans& out, size_t begin, Documents documents);

 private:
  void mark_documents(TokenRange range, const RowSpans& out) const;

  std::shared_ptr<const TokenFile> file_;
  int64_t length_, rows_;
  Documents documents_;
};

}  // namespace capstan::data
