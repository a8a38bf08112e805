// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// tokenizer.json: the input up to the first NUL byte is the file, the rest is text to encode with
// it.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "capstan/base/error.h"
#include "capstan/text/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t end = input.find('\0');
  const std::string_view text =
      end == std::string_view::npos ? "hello  1234\xff" : input.substr(end);
  try {
    const auto tokenizer = capstan::text::Tokenizer::parse(input.substr(0, end), "fuzz");
    for (const bool special : {false, true}) {
      (void)tokenizer.decode(
          tokenizer.encode(text, {.add_special = special, .parse_special = special}));
    }
  } catch (const capstan::Error&) {
  }
  return 0;
}
