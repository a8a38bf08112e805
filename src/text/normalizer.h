// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Unicode normalization of tokenizer.json: NFC, NFD, NFKC, NFKD, in sequence.
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace capstan::text {

enum class NormalForm { kNfc, kNfd, kNfkc, kNfkd };

// `text` is valid UTF-8. True when a cheap scan shows that the form leaves it as it is.
[[nodiscard]] bool is_surely_normal(std::string_view text, NormalForm form);
[[nodiscard]] std::string normalize(std::string_view text, NormalForm form);

}  // namespace capstan::text
