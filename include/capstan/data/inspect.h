// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A full check of one pair and what it holds: `capstan data inspect`.
#pragma once
#include <cstdint>
#include <optional>
#include <string>

#include "capstan/data/provenance.h"
#include "capstan/data/token_file.h"

namespace capstan::data {

struct InspectReport {
  int64_t documents = 0, sequences = 0, tokens = 0;
  TokenType type = TokenType::kInt32;
  int64_t bin_bytes = 0, idx_bytes = 0;
  int64_t shortest = 0, median = 0, longest = 0, empty_documents = 0;  // tokens per document
  int64_t largest_token = 0;
  std::string content_hash;
  std::optional<Provenance> provenance;
};

// Reads every byte of both files. Throws DataError for anything that does not hold: a field, a hash
// of PREFIX.json, a token at or above `vocab_size` (0 = that of PREFIX.json, if there is one).
[[nodiscard]] InspectReport inspect(const TokenFile& file, int64_t vocab_size = 0);

}  // namespace capstan::data
