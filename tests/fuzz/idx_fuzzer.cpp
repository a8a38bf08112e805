// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// An .idx is untrusted: any bytes either throw our error or give a view that is safe to use in
// full.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <span>

#include "capstan/base/error.h"
#include "capstan/data/token_file.h"

// The first two bytes choose the size of the .bin.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  uint16_t bin_bytes = 0;
  if (size < sizeof bin_bytes) return 0;
  std::memcpy(&bin_bytes, data, sizeof bin_bytes);
  const std::span<const std::byte> bytes =
      std::as_bytes(std::span(data, size)).subspan(sizeof bin_bytes);
  try {
    const capstan::data::IndexView view(bytes, bin_bytes, "fuzz.idx");
    int64_t tokens = 0;
    for (int64_t i = 0; i < view.documents(); ++i) {
      const capstan::data::TokenRange range = view.document(i);
      if (range.first < 0 || range.last < range.first || range.last > view.tokens()) std::abort();
      tokens += range.size();
    }
    if (tokens != view.tokens() || tokens * capstan::data::size_of(view.type()) != bin_bytes)
      std::abort();
  } catch (const capstan::Error&) {
  }
  return 0;
}
