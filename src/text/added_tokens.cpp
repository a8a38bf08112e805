// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "text/added_tokens.h"

#include <algorithm>

#include "text/bpe.h"
#include "text/unicode.h"

namespace capstan::text {
namespace {

bool has_class(uint32_t code_point, uint8_t wanted) {
  return (class_table()[code_point] & wanted) != 0;
}

// Valid characters only; a byte that is not UTF-8 is neither word nor space.
bool starts_with(std::string_view text, uint8_t wanted) {
  return sequence_length(text) > 0 && has_class(decode_at(text.data()).value, wanted);
}

bool ends_with(std::string_view text, uint8_t wanted) {
  if (text.empty()) return false;
  const std::string_view last = text.substr(last_character(text));
  return sequence_length(last) == last.size() && has_class(decode_at(last.data()).value, wanted);
}

size_t leading_space(std::string_view text) {
  size_t at = 0;
  while (starts_with(text.substr(at), kSpace)) at += decode_at(text.data() + at).length;
  return at;
}

size_t without_trailing_space(std::string_view text) {
  while (ends_with(text, kSpace)) text = text.substr(0, last_character(text));
  return text.size();
}

}  // namespace

AddedTokenMatcher::AddedTokenMatcher(std::vector<AddedToken> tokens,
                                     const std::vector<std::string>& patterns) {
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (patterns[i].empty()) continue;
    entries_.push_back({patterns[i], std::move(tokens[i])});
    starts_[static_cast<uint8_t>(patterns[i][0])] = true;
  }
  std::stable_sort(entries_.begin(), entries_.end(),
                   [](const Entry& a, const Entry& b) { return a.pattern < b.pattern; });
}

// Narrows the sorted patterns byte by byte to those that agree with the text so far.
const AddedTokenMatcher::Entry* AddedTokenMatcher::longest_at(std::string_view text) const {
  const Entry* best = nullptr;
  auto low = entries_.begin(), high = entries_.end();
  for (size_t depth = 0; depth < text.size() && low != high; ++depth) {
    const auto wanted = static_cast<uint8_t>(text[depth]);
    const auto byte_of = [depth](const Entry& entry) {
      return entry.pattern.size() > depth ? int{static_cast<uint8_t>(entry.pattern[depth])} : -1;
    };
    low = std::partition_point(low, high, [&](const Entry& e) { return byte_of(e) < wanted; });
    high = std::partition_point(low, high, [&](const Entry& e) { return byte_of(e) <= wanted; });
    if (low != high && low->pattern.size() == depth + 1) best = &*low;
  }
  return best;
}

std::vector<AddedTokenMatcher::Part> AddedTokenMatcher::split(std::string_view text,
                                                              bool parse_special) const {
  std::vector<Part> parts;
  size_t done = 0;
  const auto keep_text = [&](size_t end) {
    if (done < end) parts.push_back({kNoToken, text.substr(done, end - done)});
  };
  for (size_t at = 0; at < text.size();) {
    const Entry* entry =
        starts_[static_cast<uint8_t>(text[at])] ? longest_at(text.substr(at)) : nullptr;
    if (!entry) {
      ++at;
      continue;
    }
    size_t first = at, last = at + entry->pattern.size();
    at = last;  // a match that is then refused is still stepped over, as in the reference
    const AddedToken& token = entry->token;
    if (token.special && !parse_special) continue;
    if (token.single_word &&
        (ends_with(text.substr(0, first), kWord) || starts_with(text.substr(last), kWord))) {
      continue;
    }
    if (token.lstrip) first = std::max(done, without_trailing_space(text.substr(0, first)));
    if (token.rstrip) last += leading_space(text.substr(last));
    keep_text(first);
    parts.push_back({token.id, text.substr(first, last - first)});
    done = at = last;
  }
  keep_text(text.size());
  return parts;
}

}  // namespace capstan::text
