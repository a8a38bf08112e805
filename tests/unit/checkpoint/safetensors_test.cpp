// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/checkpoint/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "capstan/base/error.h"
#include "support/temp_dir.h"

namespace capstan::checkpoint {
namespace {

std::string file_with(const std::string& header, size_t data_bytes) {
  std::string text(8, '\0');
  const uint64_t length = header.size();
  std::memcpy(text.data(), &length, 8);
  return text + header + std::string(data_bytes, 'x');
}

std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

TEST(Safetensors, RoundTrip_KeepsNamesShapesAndBytes) {
  const test::TempDir dir;
  const std::vector<float> a = {1, 2, 3, 4, 5, 6};
  const std::vector<int64_t> b = {7};
  const WrittenFile written =
      write_safetensors(dir.path() / "x.safetensors",
                        {{"weight", DType::kFp32, {2, 3}, std::as_bytes(std::span(a))},
                         {"scalar", DType::kInt64, {}, std::as_bytes(std::span(b))},
                         {"empty", DType::kFp32, {0, 4}, {}}},
                        {{"format", "pt"}});
  EXPECT_EQ(written.bytes,
            static_cast<int64_t>(std::filesystem::file_size(dir.path() / "x.safetensors")));
  const SafetensorsFile file(dir.path() / "x.safetensors");
  EXPECT_EQ(file.header().data_begin % 8, 0);
  EXPECT_EQ(file.header().metadata.at("format"), "pt");
  const TensorView weight = file.tensor("weight");
  EXPECT_EQ(weight.shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(std::memcmp(weight.bytes.data(), a.data(), 24), 0);
  EXPECT_EQ(file.tensor("scalar").shape.size(), 0u);
  EXPECT_EQ(file.tensor("empty").bytes.size(), 0u);
  EXPECT_THROW((void)file.tensor("other"), DataError);
}

struct BadFile {
  const char* name;
  std::string content;
  const char* words;  // of the message
};

class SafetensorsRefuses : public testing::TestWithParam<BadFile> {};

TEST_P(SafetensorsRefuses, WithItsOwnMessage) {
  try {
    (void)parse_safetensors_header(bytes_of(GetParam().content), "bad.safetensors");
    FAIL() << "accepted";
  } catch (const DataError& error) {
    EXPECT_THAT(std::string(error.what()), testing::HasSubstr(GetParam().words));
    EXPECT_THAT(std::string(error.what()), testing::HasSubstr("bad.safetensors"));
  }
}

std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  int begin, int end) {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape +
         ",\"data_offsets\":[" + std::to_string(begin) + "," + std::to_string(end) + "]}";
}

std::string huge_header() {
  std::string text(16, '{');
  const uint64_t length = 200'000'000;
  std::memcpy(text.data(), &length, 8);
  return text;
}

INSTANTIATE_TEST_SUITE_P(
    Table, SafetensorsRefuses,
    testing::Values(
        BadFile{"short", "abc", "header length"}, BadFile{"huge", huge_header(), "100,000,000"},
        BadFile{"beyond_file", file_with("{}", 0).replace(0, 1, "\x40"), "within the file"},
        BadFile{"no_brace", file_with(" {}", 0), "start with '{'"},
        BadFile{"not_json", file_with("{\"a\":", 0), "bad.safetensors"},
        BadFile{"duplicate",
                file_with("{" + entry("a", "F32", "[1]", 0, 4) + "," +
                              entry("a", "F32", "[1]", 0, 4) + "}",
                          4),
                "a"},
        BadFile{"dtype", file_with("{" + entry("a", "F99", "[1]", 0, 4) + "}", 4), "F99"},
        BadFile{"overlap",
                file_with("{" + entry("a", "F32", "[1]", 0, 4) + "," +
                              entry("b", "F32", "[1]", 2, 6) + "}",
                          6),
                "no overlap"},
        BadFile{"hole",
                file_with("{" + entry("a", "F32", "[1]", 0, 4) + "," +
                              entry("b", "F32", "[1]", 8, 12) + "}",
                          12),
                "no hole"},
        BadFile{"short_data", file_with("{" + entry("a", "F32", "[2]", 0, 8) + "}", 4),
                "the end of the last tensor"},
        BadFile{"long_data", file_with("{" + entry("a", "F32", "[1]", 0, 4) + "}", 9),
                "the end of the last tensor"},
        BadFile{
            "overflow",
            file_with("{" + entry("a", "F32", "[4611686018427387904,4611686018427387904]", 0, 4) +
                          "}",
                      4),
            "overflows"},
        BadFile{"wrong_length", file_with("{" + entry("a", "F32", "[3]", 0, 4) + "}", 4),
                "for its shape"},
        BadFile{"negative", file_with("{" + entry("a", "F32", "[-1]", 0, 4) + "}", 4),
                "whole number"},
        BadFile{"backwards",
                file_with("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}}", 4),
                "begin <= end"},
        BadFile{
            "extra_key",
            file_with("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4],\"x\":1}}",
                      4),
            "unknown key"},
        BadFile{"metadata", file_with("{\"__metadata__\":{\"a\":1}}", 0), "__metadata__"}),
    [](const auto& which) { return which.param.name; });

TEST(Safetensors, SeededMutations_AreReadOrRefused) {
  const std::string good =
      file_with("{" + entry("a", "F32", "[2,1]", 0, 8) + "," + entry("b", "BF16", "[3]", 8, 14) +
                    ",\"__metadata__\":{\"k\":\"v\"}}",
                14);
  std::mt19937_64 random(20261124);
  int refused = 0;
  for (int i = 0; i < 10'000; ++i) {
    std::string text = good;
    const int edits = 1 + static_cast<int>(random() % 4);
    for (int e = 0; e < edits; ++e) {
      const size_t at = random() % text.size();
      switch (random() % 3) {
        case 0:
          text[at] = static_cast<char>(random());
          break;
        case 1:
          text.erase(at, 1 + random() % 5);
          break;
        default:
          text.insert(at, 1 + random() % 5, "0{}[],:\"9-e."[random() % 12]);
          break;
      }
      if (text.empty()) text = "x";
    }
    try {
      (void)parse_safetensors_header(bytes_of(text), "mutated");
    } catch (const Error&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 5'000);
}

}  // namespace
}  // namespace capstan::checkpoint
