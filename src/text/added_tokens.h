// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Tokens that are cut out of the text before anything else: the leftmost match, the longest there.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace capstan::text {

struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool special = false, single_word = false, lstrip = false, rstrip = false, normalized = false;
};

class AddedTokenMatcher {
 public:
  struct Part {
    int32_t id;  // kNoToken for text between tokens
    std::string_view text;
  };
  AddedTokenMatcher() = default;
  // `patterns[i]` is what stands for tokens[i] in the text (its content, normalized where it asks).
  AddedTokenMatcher(std::vector<AddedToken> tokens, const std::vector<std::string>& patterns);

  [[nodiscard]] bool empty() const { return entries_.empty(); }
  // Parts in order, empty text left out. Special tokens count as text unless `parse_special`.
  [[nodiscard]] std::vector<Part> split(std::string_view text, bool parse_special) const;

 private:
  struct Entry {
    std::string pattern;
    AddedToken token;
  };
  [[nodiscard]] const Entry* longest_at(std::string_view text) const;

  std::vector<Entry> entries_;  // by pattern
  bool starts_[256] = {};       // first bytes of the patterns
};

}  // namespace capstan::text
