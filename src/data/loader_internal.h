// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Steps that training and validation share.
#pragma once
#include <cstdint>
#include <memory>
#include <string>

#include "capstan/data/loader.h"

namespace capstan::data {

// Opens a pair and refuses it when PREFIX.json names another tokenizer than `fingerprint` (empty =
// not checked).
std::shared_ptr<const TokenFile> open_tokens(const std::string& path,
                                             const std::string& fingerprint);

// Reads one row; throws DataError for an id at or above `vocab_size` (0 = not checked).
void read_row(const RowSpace& space, int64_t row, int64_t vocab_size, const RowSpans& out);

}  // namespace capstan::data
