// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "text/normalizer.h"

#include <utf8proc.h>

#include "capstan/base/error.h"
#include "text/unicode.h"

namespace capstan::text {

bool is_surely_normal(std::string_view text, NormalForm form) {
  // Below these code points nothing decomposes or combines. For NFC only the first combining mark
  // matters, whose lead byte is 0xcc.
  const uint8_t limit = form == NormalForm::kNfc ? 0xcc : 0x80;
  for (const char c : text) {
    if (static_cast<uint8_t>(c) >= limit) return false;
  }
  return true;
}

std::string normalize(std::string_view text, NormalForm form) {
  if (is_surely_normal(text, form)) return std::string(text);
  int options = UTF8PROC_STABLE;
  const bool compose = form == NormalForm::kNfc || form == NormalForm::kNfkc;
  options |= compose ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE;
  if (form == NormalForm::kNfkc || form == NormalForm::kNfkd) options |= UTF8PROC_COMPAT;
  utf8proc_uint8_t* result = nullptr;
  const auto length = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                                   static_cast<utf8proc_ssize_t>(text.size()), &result,
                                   static_cast<utf8proc_option_t>(options));
  if (length < 0) {
    throw DataError({.module = "text", .what = "normalizing text", .got = utf8proc_errmsg(length)});
  }
  std::string out(reinterpret_cast<const char*>(result), static_cast<size_t>(length));
  std::free(result);  // utf8proc allocates with malloc
  return out;
}

}  // namespace capstan::text
