// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "capstan/base/check.h"
#include "capstan/base/error.h"
#include "capstan/data/token_file.h"
#include "data/index_internal.h"

namespace capstan::data {
namespace {

using namespace index_layout;

[[noreturn]] void refuse(const std::string& origin, std::string_view field, std::string got,
                         std::string need, std::string why = {}) {
  throw DataError(
      ErrorText{.module = "data",
                .what = fmt::format("reading {}: field {}", origin, field),
                .got = std::move(got),
                .need = std::move(need),
                .why = std::move(why),
                .fix = "Copy the pair again or rebuild it with `capstan data prepare`"});
}

std::string type_problem(uint8_t code) {
  static constexpr std::array<const char*, 9> kNames = {
      "nothing", "uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"};
  return code < kNames.size() ? fmt::format("{} ({})", code, kNames[code])
                              : fmt::format("{}", code);
}

}  // namespace

IndexView::IndexView(std::span<const std::byte> bytes, int64_t bin_bytes, const std::string& origin)
    : bytes_(bytes) {
  read_header(origin);
  check_sequences(bin_bytes, origin);
  check_documents(origin);
}

void IndexView::read_header(const std::string& origin) {
  if (bytes_.size() < kHeaderBytes) {
    refuse(origin, "header", fmt::format("a file of {} bytes", bytes_.size()),
           fmt::format("at least {}", kHeaderBytes), "the file was cut off");
  }
  if (std::memcmp(bytes_.data(), kMagic.data(), kMagic.size()) != 0) {
    refuse(origin, "magic", "other bytes", "MMIDIDX and two zero bytes",
           "this is not a token index");
  }
  const auto version = load<uint64_t>(bytes_, kVersionAt);
  if (version != kVersion) refuse(origin, "version", fmt::format("{}", version), "1");
  const auto code = load<uint8_t>(bytes_, kTypeAt);
  if (code != uint8_t(TokenType::kInt32) && code != uint8_t(TokenType::kUint16)) {
    refuse(origin, "dtype code", type_problem(code), "4 (int32) or 8 (uint16)");
  }
  type_ = TokenType{code};

  // Bounded by the size of the file before anything is computed from them, so no sum can overflow.
  const uint64_t payload = bytes_.size() - kHeaderBytes;
  const auto sequences = load<uint64_t>(bytes_, kSequencesAt);
  const auto documents = load<uint64_t>(bytes_, kDocumentsAt);
  if (sequences > payload / (sizeof(int32_t) + sizeof(int64_t))) {
    refuse(origin, "sequence count", fmt::format("{}", sequences),
           fmt::format("at most {}", payload / (sizeof(int32_t) + sizeof(int64_t))),
           fmt::format("the file has {} bytes", bytes_.size()));
  }
  if (documents > payload / sizeof(int64_t)) {
    refuse(origin, "document count", fmt::format("{}", documents),
           fmt::format("at most {}", payload / sizeof(int64_t)),
           fmt::format("the file has {} bytes", bytes_.size()));
  }
  if (documents < 2 || sequences == 0) {
    refuse(origin, documents < 2 ? "document count" : "sequence count",
           fmt::format("{} document indices over {} sequences", documents, sequences),
           "at least one document, which takes two indices and one sequence",
           "the file holds no text");
  }
  const uint64_t need =
      sequences * (sizeof(int32_t) + sizeof(int64_t)) + documents * sizeof(int64_t);
  if (payload == need + sequences) {
    refuse(origin, "sequence modes", "a multimodal index", "text only");
  }
  if (payload != need) {
    refuse(origin, "file size", fmt::format("{} bytes", bytes_.size()),
           fmt::format("{} for {} sequences and {} document indices", need + kHeaderBytes,
                       sequences, documents));
  }
  sequences_ = static_cast<int64_t>(sequences);
  documents_ = static_cast<int64_t>(documents) - 1;
}

void IndexView::check_sequences(int64_t bin_bytes, const std::string& origin) {
  int64_t expected = 0;
  for (int64_t i = 0; i < sequences_; ++i) {
    const int32_t count = length(i);
    if (count < 0)
      refuse(origin, fmt::format("length[{}]", i), fmt::format("{}", count), "0 or more");
    const int64_t at = pointer(i);
    if (at < 0 || at > bin_bytes) {
      refuse(origin, fmt::format("pointer[{}]", i), fmt::format("{}", at),
             fmt::format("0 to {}", bin_bytes), "that is the size of the .bin file");
    }
    if (at != expected) {
      refuse(origin, fmt::format("pointer[{}]", i), fmt::format("{}", at),
             fmt::format("{}", expected),
             at < expected ? "pointers must not run backwards or overlap"
                           : "sequences must follow without a gap");
    }
    expected += int64_t{count} * size_of(type_);
    if (expected > bin_bytes) {
      refuse(origin, fmt::format("length[{}]", i),
             fmt::format("a sequence that ends at byte {}", expected),
             fmt::format("at most {}", bin_bytes), "the .bin file is shorter than its index says");
    }
  }
  if (expected != bin_bytes) {
    refuse(origin, "lengths", fmt::format("sequences of {} bytes in all", expected),
           fmt::format("{}", bin_bytes), "the .bin file is longer than its index says");
  }
  if (expected == 0) refuse(origin, "lengths", "no token in any sequence", "at least one");
  tokens_ = expected / size_of(type_);
}

void IndexView::check_documents(const std::string& origin) const {
  int64_t previous = 0;
  for (int64_t i = 0; i <= documents_; ++i) {
    const int64_t at = first_sequence(i);
    const std::string_view why = i == 0            ? "the first document starts at sequence 0"
                                 : i == documents_ ? "the last document ends with the last sequence"
                                                   : "document indices must not run backwards";
    const int64_t low = i == documents_ ? sequences_ : previous;
    const int64_t high = i == 0 ? 0 : sequences_;
    if (at < low || at > high) {
      refuse(origin, fmt::format("document index[{}]", i), fmt::format("{}", at),
             low == high ? fmt::format("{}", low) : fmt::format("{} to {}", low, high),
             std::string(why));
    }
    previous = at;
  }
}

int32_t IndexView::length(int64_t sequence) const {
  return load<int32_t>(bytes_, kHeaderBytes + size_t(sequence) * sizeof(int32_t));
}

int64_t IndexView::pointer(int64_t sequence) const {
  return load<int64_t>(bytes_, kHeaderBytes + size_t(sequences_) * sizeof(int32_t) +
                                   size_t(sequence) * sizeof(int64_t));
}

int64_t IndexView::first_sequence(int64_t document) const {
  return load<int64_t>(bytes_, kHeaderBytes +
                                   size_t(sequences_) * (sizeof(int32_t) + sizeof(int64_t)) +
                                   size_t(document) * sizeof(int64_t));
}

int64_t IndexView::token_at(int64_t sequence) const {
  return sequence == sequences_ ? tokens_ : pointer(sequence) / size_of(type_);
}

TokenRange IndexView::document(int64_t index) const {
  CAPSTAN_CHECK(index >= 0 && index < documents_, "document {} of {}", index, documents_);
  return {token_at(first_sequence(index)), token_at(first_sequence(index + 1))};
}

}  // namespace capstan::data
