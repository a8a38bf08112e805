// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <string>
#include <vector>

#include "capstan/base/error.h"
#include "capstan/base/text.h"
#include "text/regex.h"

namespace capstan::text {
namespace {

constexpr std::string_view kVowelSeparator = "\\x{180e}";

[[noreturn]] void refuse_in(std::string_view pattern, std::string_view origin,
                            const std::string& got, const std::string& why) {
  throw DataError({.module = "text",
                   .what = "reading the pattern " + quote(pattern) + " of " + std::string(origin),
                   .got = got,
                   .need = "a construct that means the same to Oniguruma and PCRE2",
                   .why = why});
}

// One pass over the pattern; every atom is copied with its start remembered, so that a repeat of a
// repeat can be wrapped in a group.
class Rewriter {
 public:
  Rewriter(std::string_view pattern, std::string_view origin) : in_(pattern), origin_(origin) {}

  std::string run() {
    while (at_ < in_.size()) {
      const char c = in_[at_];
      if (c == '\\') {
        begin_atom();
        escape();
      } else if (c == '[') {
        begin_atom();
        character_class();
      } else if (c == '(') {
        open_group();
      } else if (c == ')') {
        close_group();
      } else if (c == '{' && interval_end() > at_) {
        interval();
      } else {
        if (c != '*' && c != '+' && c != '?') begin_atom();
        out_ += in_[at_++];
      }
    }
    return std::move(out_);
  }

 private:
  [[noreturn]] void refuse(const std::string& got, const std::string& why) const {
    refuse_in(in_, origin_, got, why);
  }
  void begin_atom() { atom_ = out_.size(); }

  void escape() {
    if (at_ + 1 >= in_.size()) refuse("a lone backslash at the end", "");
    const char c = in_[at_ + 1];
    const std::string_view both = in_.substr(at_, 2);
    at_ += 2;
    if (c == 's') {
      out_ += "(?:(?!" + std::string(kVowelSeparator) + ")\\s)";
    } else if (c == 'S') {
      out_ += "(?:\\S|" + std::string(kVowelSeparator) + ")";
    } else if (c == 'h') {
      out_ += "[0-9a-fA-F]";
    } else if (c == 'H') {
      out_ += "[^0-9a-fA-F]";
    } else if (c == 'C' || c == 'g' || c == 'k' || c == 'K' || c == 'Q' || c == 'E' || c == 'N' ||
               c == 'O' || c == 'y' || c == 'Y') {
      refuse(quote(both), "the engines read it differently");
    } else if (c == 'u') {
      out_ += code_unit();
    } else {
      out_ += both;
      const size_t close = at_ < in_.size() && in_[at_] == '{' ? in_.find('}', at_) : at_;
      const bool has_name = c == 'p' || c == 'P' || c == 'x';
      if (has_name && close != at_ && close != std::string_view::npos) {
        out_ += in_.substr(at_, close + 1 - at_);
        at_ = close + 1;
      }
    }
  }

  // The four digits after \u, as PCRE2 writes them.
  std::string code_unit() {
    const std::string_view digits = in_.substr(std::min(at_, in_.size()), 4);
    if (digits.size() < 4 ||
        digits.find_first_not_of("0123456789abcdefABCDEF") != std::string_view::npos) {
      refuse("'\\u' without four hexadecimal digits", "");
    }
    at_ += 4;
    return "\\x{" + std::string(digits) + "}";
  }

  // [...] without another class inside: Oniguruma's set operations have no PCRE2 form.
  void character_class() {
    std::string body = "[";
    size_t at = at_ + 1;
    const bool negated = at < in_.size() && in_[at] == '^';
    if (negated) body += in_[at++];
    bool has_space = false, has_not_space = false, first = true;
    for (;; first = false) {
      if (at >= in_.size()) refuse("a '[' without its ']'", "");
      const char c = in_[at];
      if (c == ']' && !first) break;
      if (c == '\\') {
        if (at + 1 >= in_.size()) refuse("a lone backslash at the end", "");
        const char kind = in_[at + 1];
        has_space |= kind == 's';
        has_not_space |= kind == 'S';
        if (kind == 'h') {
          body += "0-9a-fA-F";
        } else if (kind == 'u') {
          at_ = at + 2;
          body += code_unit();
          at = at_;
          continue;
        } else if (kind == 'H' || kind == 'R' || kind == 'X' || kind == 'Q' || kind == 'N') {
          refuse(quote(in_.substr(at, 2)) + " inside a class", "");
        } else {
          body += in_.substr(at, 2);
        }
        at += 2;
        continue;
      }
      if ((c == '[' && in_.substr(at, 2) != "[:") || in_.substr(at, 2) == "&&") {
        refuse("a class inside a class", "set operations exist in Oniguruma only");
      }
      if (c == '[') {
        const size_t close = in_.find(":]", at);
        if (close == std::string_view::npos) refuse("a '[:' without its ':]'", "");
        body += in_.substr(at, close + 2 - at);
        at = close + 2;
        continue;
      }
      body += c;
      ++at;
    }
    at_ = at + 1;
    add_class(body + ']', negated, has_space, has_not_space);
  }

  // The separator has to count as not whitespace, whichever way the class speaks of whitespace.
  void add_class(const std::string& body, bool negated, bool has_space, bool has_not_space) {
    const std::string separator(kVowelSeparator);
    if (has_space && has_not_space) {
      out_ += body;
    } else if ((has_space && negated) || (has_not_space && !negated)) {
      out_ += "(?:" + body + "|" + separator + ")";
    } else if (has_space || has_not_space) {
      out_ += "(?:(?!" + separator + ")" + body + ")";
    } else {
      out_ += body;
    }
  }

  void open_group() {
    if (in_.substr(at_, 2) == "(*") refuse("'(*'", "it would change limits of the engine");
    static constexpr std::string_view kAllowed[] = {"(?:", "(?=",  "(?!",  "(?<=", "(?<!",
                                                    "(?>", "(?i:", "(?i)", "(?-i:"};
    std::string_view head = in_.substr(at_, 1);
    if (in_.substr(at_, 2) == "(?") {
      head = {};
      for (const std::string_view allowed : kAllowed) {
        if (in_.substr(at_, allowed.size()) == allowed) head = allowed;
      }
      if (head.empty()) refuse(quote(in_.substr(at_, 4)), "");
    }
    if (head != "(?i)") groups_ += 1, starts_.push_back(out_.size());
    out_ += head;
    at_ += head.size();
    if (groups_ > 200) refuse("more than 200 groups", "");
  }

  void close_group() {
    if (starts_.empty()) refuse("a ')' without its '('", "");
    atom_ = starts_.back();
    starts_.pop_back();
    out_ += in_[at_++];
  }

  // Position after a well-formed {n}, {n,}, {,m} or {n,m} at at_; at_ when it is literal text.
  [[nodiscard]] size_t interval_end() const {
    const size_t close = in_.find('}', at_);
    if (close == std::string_view::npos || close == at_ + 1) return at_;
    const std::string_view inside = in_.substr(at_ + 1, close - at_ - 1);
    const bool ok = inside.find_first_not_of("0123456789,") == std::string_view::npos &&
                    inside.find_first_of("0123456789") != std::string_view::npos;
    return ok ? close + 1 : at_;
  }

  void interval() {
    const size_t end = interval_end();
    std::string text(in_.substr(at_, end - at_));
    if (text.starts_with("{,")) text.insert(1, "0");
    at_ = end;
    out_ += text;
    if (at_ < in_.size() && in_[at_] == '+') {
      out_.insert(atom_, "(?:");
      out_ += ')';
    }
  }

  std::string_view in_, origin_;
  size_t at_ = 0;
  std::string out_;
  size_t atom_ = 0;  // where the last atom starts in out_
  int groups_ = 0;
  std::vector<size_t> starts_;
};

}  // namespace

std::string pcre2_pattern(std::string_view pattern, std::string_view origin) {
  return Rewriter(pattern, origin).run();
}

}  // namespace capstan::text
