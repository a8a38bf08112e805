// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Patterns of tokenizer.json on PCRE2, made to agree with Oniguruma, which the `tokenizers` package
// uses.
#pragma once
#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

namespace capstan::text {

// PCRE2 form of a pattern in Oniguruma's Ruby syntax. U+180E is whitespace to PCRE2 only, \h is a
// hexadecimal digit to Oniguruma, {n,m}+ is a repeated repeat there. Throws DataError for
// constructs that the two engines read differently and that have no such form; `origin` names it
// there.
[[nodiscard]] std::string pcre2_pattern(std::string_view pattern, std::string_view origin);

// Compiled, shared by threads. Memory of matching is per thread.
class Regex {
 public:
  enum class Kind { kPattern, kLiteral };
  // Throws DataError when the pattern does not compile. `origin` names it in errors.
  Regex(std::string_view pattern, Kind kind, std::string origin);
  ~Regex();
  Regex(Regex&&) noexcept;
  Regex& operator=(Regex&&) noexcept;

  // Calls `take(piece)` for every match and for every stretch between matches, in order; empty ones
  // are left out. `text` is valid UTF-8. Throws DataError when a match runs into its limits.
  void split(std::string_view text, const std::function<void(std::string_view)>& take) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace capstan::text
