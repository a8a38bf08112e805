// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Hand-written scanners that cut text exactly as the regular expressions of GPT-2, Llama 3 and Qwen
// 2 do.
#pragma once
#include <cstddef>
#include <optional>
#include <string_view>

#include "capstan/text/bpe_trainer.h"

namespace capstan::text {

// The regular expression that a scanner stands for.
[[nodiscard]] std::string_view regex_of(PiecePattern pattern);
// The scanner for a regular expression written in one of the ways met in tokenizer.json files.
[[nodiscard]] std::optional<PiecePattern> known_pattern(std::string_view regex);

// Bytes of the first piece of `text`, which is valid UTF-8 and not empty; the end of `text` counts
// as the end of the input. Never 0.
using Scan = size_t (*)(std::string_view text);
[[nodiscard]] Scan scanner_of(PiecePattern pattern);

}  // namespace capstan::text
