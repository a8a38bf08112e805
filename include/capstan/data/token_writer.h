// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Writes a .bin/.idx pair under temporary names in constant memory. The pair becomes visible only
// through commit_pairs, .idx last, so a reader never meets half a pair.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "capstan/data/token_file.h"

namespace capstan::data {

struct PairSummary {
  int64_t documents = 0, tokens = 0;
  int64_t bin_bytes = 0, idx_bytes = 0;
  std::string bin_xxh3, idx_xxh3;  // XXH3-128 of the whole files
};

// Not thread-safe. A writer that was not finished removes its temporary files.
class TokenWriter {
 public:
  // Temporary files left by a killed writer of the same prefix are removed first; the caller keeps
  // two writers of one prefix apart.
  TokenWriter(Path prefix, TokenType type);
  ~TokenWriter();
  TokenWriter(TokenWriter&&) noexcept;
  TokenWriter& operator=(TokenWriter&&) noexcept;

  // Throws DataError for an id outside the type and for 2^31 tokens or more. An empty document is
  // kept.
  void add_document(std::span<const int32_t> tokens);
  [[nodiscard]] int64_t documents() const;
  [[nodiscard]] int64_t tokens() const;
  // Writes the .idx and makes both files durable, still under temporary names.
  PairSummary finish();
  // The JSON beside the pair, also under a temporary name.
  void set_provenance(std::string_view json);

 private:
  friend void commit_pairs(std::span<TokenWriter* const>,
                           const std::function<void(std::string_view)>&);
  struct State;
  std::unique_ptr<State> state_;
};

// Gives finished pairs their names: takes old .idx files away, renames .json and .bin, then every
// .idx, with folders synced in between. `stage` is told before each operation (tests end the
// process there).
void commit_pairs(std::span<TokenWriter* const> writers,
                  const std::function<void(std::string_view)>& stage = {});

}  // namespace capstan::data
