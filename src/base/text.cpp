// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/base/text.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdint>

namespace capstan {

namespace {

char fold(char c) {
  if (c >= 'A' && c <= 'Z') return static_cast<char>(c - 'A' + 'a');
  return c == '-' ? '_' : c;
}

// Edit distance with swaps of neighbours; case and '-' versus '_' cost nothing.
size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> before(b.size() + 1), last(b.size() + 1), now(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) last[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    now[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const bool same = fold(a[i - 1]) == fold(b[j - 1]);
      now[j] = std::min({last[j] + 1, now[j - 1] + 1, last[j - 1] + (same ? 0 : 1)});
      if (i > 1 && j > 1 && fold(a[i - 1]) == fold(b[j - 2]) && fold(a[i - 2]) == fold(b[j - 1])) {
        now[j] = std::min(now[j], before[j - 2] + 1);
      }
    }
    std::swap(before, last);
    std::swap(last, now);
  }
  return last[b.size()];
}

struct Utf8Lead {
  size_t length;      // 0 = not a lead byte
  uint8_t low, high;  // range of the second byte
};

// RFC 3629 section 4: the second byte's range excludes overlong forms, surrogates and values above
// U+10FFFF.
Utf8Lead lead_of(uint8_t byte) {
  if (byte < 0x80) return {1, 0, 0};
  if (byte >= 0xC2 && byte <= 0xDF) return {2, 0x80, 0xBF};
  if (byte == 0xE0) return {3, 0xA0, 0xBF};
  if (byte == 0xED) return {3, 0x80, 0x9F};
  if (byte >= 0xE1 && byte <= 0xEF) return {3, 0x80, 0xBF};
  if (byte == 0xF0) return {4, 0x90, 0xBF};
  if (byte >= 0xF1 && byte <= 0xF3) return {4, 0x80, 0xBF};
  if (byte == 0xF4) return {4, 0x80, 0x8F};
  return {0, 0, 0};
}

// Length of the well-formed character at `at`, 0 when it is not one.
size_t character_length(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const Utf8Lead lead = lead_of(byte(at));
  if (lead.length == 0 || at + lead.length > text.size()) return 0;
  for (size_t i = 1; i < lead.length; ++i) {
    const uint8_t low = i == 1 ? lead.low : 0x80, high = i == 1 ? lead.high : 0xBF;
    if (byte(at + i) < low || byte(at + i) > high) return 0;
  }
  return lead.length;
}

void append_escaped(std::string& out, std::string_view character) {
  const char c = character[0];
  if (character.size() > 1) {
    out += character;
  } else if (c == '\n') {
    out += "\\n";
  } else if (c == '\t') {
    out += "\\t";
  } else if (c == '\r') {
    out += "\\r";
  } else if (c == '\'' || c == '\\') {
    out += '\\';
    out += c;
  } else if (static_cast<uint8_t>(c) < 0x20 || static_cast<uint8_t>(c) >= 0x7F) {
    out += fmt::format("\\x{:02x}", static_cast<uint8_t>(c));
  } else {
    out += c;
  }
}

std::vector<std::string_view> split_parts(std::string_view path) {
  std::vector<std::string_view> parts;
  while (!path.empty()) {
    const size_t slash = path.find('/');
    const std::string_view part = path.substr(0, slash);
    if (!part.empty() && part != ".") parts.push_back(part);
    if (slash == std::string_view::npos) break;
    path.remove_prefix(slash + 1);
  }
  return parts;
}

// * and ? within one part; remembers only the last star, so the time is at most pattern x text.
bool match_part(std::string_view pattern, std::string_view text) {
  size_t p = 0, t = 0, star = std::string_view::npos, retry = 0;
  while (t < text.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      retry = t;
    } else if (p < pattern.size() && (pattern[p] == '?' || pattern[p] == text[t])) {
      const size_t step = pattern[p] == '?' ? std::max<size_t>(1, character_length(text, t)) : 1;
      ++p;
      t += step;
    } else if (star != std::string_view::npos) {
      p = star + 1;
      t = ++retry;
    } else {
      return false;
    }
  }
  while (p < pattern.size() && pattern[p] == '*') ++p;
  return p == pattern.size();
}

// Whole-path match; with `prefix`, a match of the leading parts is enough (the pattern names a
// folder).
bool match_parts(std::span<const std::string_view> pattern, std::span<const std::string_view> path,
                 bool prefix) {
  // reach[j]: the pattern so far can end after j parts.
  std::vector<bool> reach(path.size() + 1, false);
  reach[0] = true;
  for (const std::string_view part : pattern) {
    std::vector<bool> next(path.size() + 1, false);
    for (size_t j = 0; j <= path.size(); ++j) {
      if (!reach[j]) continue;
      if (part == "**") {
        std::fill(next.begin() + static_cast<std::ptrdiff_t>(j), next.end(), true);
        break;
      }
      if (j < path.size() && match_part(part, path[j])) next[j + 1] = true;
    }
    reach = std::move(next);
  }
  if (reach[path.size()]) return true;
  return prefix && std::find(reach.begin() + 1, reach.end(), true) != reach.end();
}

}  // namespace

std::optional<std::string> nearest_name(std::string_view word,
                                        std::span<const std::string> candidates) {
  const std::string* best = nullptr;
  size_t best_distance = 0;
  for (const std::string& candidate : candidates) {
    const size_t allowed = std::clamp<size_t>(std::max(word.size(), candidate.size()) / 3, 1, 3);
    const size_t longer = std::max(word.size(), candidate.size());
    const size_t shorter = std::min(word.size(), candidate.size());
    if (longer - shorter > allowed || longer > 256) continue;
    const size_t distance = edit_distance(word, candidate);
    if (distance > allowed || distance >= shorter) continue;
    if (best == nullptr || distance < best_distance) {
      best = &candidate;
      best_distance = distance;
    }
  }
  if (best == nullptr) return std::nullopt;
  return *best;
}

std::optional<size_t> find_invalid_utf8(std::string_view text) {
  size_t at = 0;
  while (at < text.size()) {
    const size_t length = character_length(text, at);
    if (length == 0) return at;
    at += length;
  }
  return std::nullopt;
}

std::string quote(std::string_view text, size_t limit) {
  std::string out = "'";
  size_t at = 0;
  while (at < text.size()) {
    const size_t length = std::max<size_t>(1, character_length(text, at));
    if (at + length > limit) break;
    append_escaped(out, text.substr(at, length));
    at += length;
  }
  out += "'";
  if (at < text.size()) out += fmt::format("... ({} bytes)", text.size());
  return out;
}

std::string join(std::span<const std::string> parts, std::string_view separator) {
  std::string out;
  for (size_t i = 0; i < parts.size(); ++i) {
    if (i > 0) out += separator;
    out += parts[i];
  }
  return out;
}

bool glob_match(std::string_view pattern, std::string_view path) {
  const bool names_folder = pattern.ends_with('/');
  while (pattern.ends_with('/')) pattern.remove_suffix(1);
  if (pattern.empty()) return false;
  std::vector<std::string_view> path_parts = split_parts(path);
  if (names_folder && !path_parts.empty()) path_parts.pop_back();
  if (pattern.find('/') == std::string_view::npos && pattern != "**") {
    return std::any_of(path_parts.begin(), path_parts.end(),
                       [&](std::string_view part) { return match_part(pattern, part); });
  }
  const std::vector<std::string_view> pattern_parts = split_parts(pattern);
  if (pattern_parts.empty()) return false;
  const bool prefix =
      names_folder || pattern_parts.back().find_first_of("*?") == std::string_view::npos;
  return match_parts(pattern_parts, path_parts, prefix);
}

}  // namespace capstan
