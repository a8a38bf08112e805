// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "text/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <array>

#include "capstan/base/error.h"
#include "capstan/base/text.h"
#include "text/unicode.h"

namespace capstan::text {
namespace {

// About half a second of backtracking; the patterns of real tokenizers need a few steps per
// character.
constexpr uint32_t kMatchLimit = 20'000'000;
constexpr uint32_t kHeapLimitKiB = 64 * 1024;
constexpr size_t kPatternLimit = 16 * 1024;

std::string message_of(int code) {
  std::array<PCRE2_UCHAR, 256> buffer{};
  pcre2_get_error_message(code, buffer.data(), buffer.size());
  return reinterpret_cast<const char*>(buffer.data());
}

// Scratch memory of one thread, reused by every pattern.
struct Scratch {
  pcre2_match_data* data = pcre2_match_data_create(1, nullptr);
  pcre2_match_context* context = pcre2_match_context_create(nullptr);
  pcre2_jit_stack* stack = pcre2_jit_stack_create(32 * 1024, 4 * 1024 * 1024, nullptr);

  Scratch() {
    if (!data || !context) throw std::bad_alloc();
    pcre2_set_match_limit(context, kMatchLimit);
    pcre2_set_heap_limit(context, kHeapLimitKiB);
    if (stack) pcre2_jit_stack_assign(context, nullptr, stack);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    pcre2_match_data_free(data);
    pcre2_match_context_free(context);
    pcre2_jit_stack_free(stack);
  }
};

}  // namespace

struct Regex::State {
  pcre2_code* code = nullptr;
  std::string pattern, origin;

  State() = default;
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  ~State() { pcre2_code_free(code); }

  int match(std::string_view text, size_t from, uint32_t options, Scratch& scratch) const {
    const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
    options |= PCRE2_NO_UTF_CHECK;
    int result =
        pcre2_match(code, subject, text.size(), from, options, scratch.data, scratch.context);
    if (result == PCRE2_ERROR_JIT_STACKLIMIT) {
      result = pcre2_match(code, subject, text.size(), from, options | PCRE2_NO_JIT, scratch.data,
                           scratch.context);
    }
    return result;
  }

  [[noreturn]] void fail(int code_of_pcre2) const {
    throw DataError({.module = "text",
                     .what = "splitting text by the pattern " + quote(pattern) + " of " + origin,
                     .got = message_of(code_of_pcre2),
                     .need = "a pattern that needs fewer than 20,000,000 steps for a match",
                     .why = "it backtracks too much on this text"});
  }
};

Regex::Regex(std::string_view pattern, Kind kind, std::string origin)
    : state_(std::make_unique<State>()) {
  state_->pattern = pattern;
  state_->origin = std::move(origin);
  const auto refuse = [&](const std::string& got, size_t offset) {
    throw DataError({.module = "text",
                     .what = "compiling the pattern " + quote(pattern) + " of " + state_->origin,
                     .got = got + " at offset " + std::to_string(offset)});
  };
  if (pattern.size() > kPatternLimit) refuse("more than 16 KiB", kPatternLimit);
  if (pattern.empty()) refuse("an empty pattern", 0);
  const bool literal = kind == Kind::kLiteral;
  const std::string source =
      literal ? std::string(pattern) : pcre2_pattern(pattern, state_->origin);
  uint32_t options = PCRE2_UTF | PCRE2_NEVER_BACKSLASH_C;
  options = literal ? PCRE2_UTF | PCRE2_LITERAL : options | PCRE2_UCP | PCRE2_MULTILINE;
  const std::unique_ptr<pcre2_compile_context, void (*)(pcre2_compile_context*)> context(
      pcre2_compile_context_create(nullptr), pcre2_compile_context_free);
  if (!context) throw std::bad_alloc();
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  pcre2_set_parens_nest_limit(context.get(), 100);
  int error = 0;
  PCRE2_SIZE offset = 0;
  state_->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(source.data()), source.size(), options,
                               &error, &offset, context.get());
  if (!state_->code) refuse(message_of(error), offset);
  pcre2_jit_compile(state_->code, PCRE2_JIT_COMPLETE);  // without it the interpreter is used
}

Regex::~Regex() = default;
Regex::Regex(Regex&&) noexcept = default;
Regex& Regex::operator=(Regex&&) noexcept = default;

void Regex::split(std::string_view text, const std::function<void(std::string_view)>& take) const {
  thread_local Scratch scratch;
  const auto piece = [&](size_t first, size_t last) {
    if (first < last) take(text.substr(first, last - first));
  };
  size_t done = 0, from = 0;
  while (from <= text.size()) {
    const int result = state_->match(text, from, 0, scratch);
    if (result == PCRE2_ERROR_NOMATCH) break;
    if (result < 0) state_->fail(result);
    const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer(scratch.data);
    const size_t first = bounds[0], last = bounds[1];
    if (last < first || first < done) state_->fail(PCRE2_ERROR_INTERNAL);
    piece(done, first);
    piece(first, last);
    done = last;
    // After an empty match the search goes on behind the next character.
    from = last;
    if (first == last) from += last < text.size() ? decode_at(text.data() + last).length : 1;
  }
  piece(done, text.size());
}

}  // namespace capstan::text
