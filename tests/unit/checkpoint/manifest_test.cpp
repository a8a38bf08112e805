// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/checkpoint/manifest.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "capstan/base/error.h"
#include "capstan/base/hash.h"

namespace capstan::checkpoint {
namespace {

Manifest make() {
  Manifest m;
  m.step = 12;
  m.program = "capstan";
  m.created = "2026-01-01T00:00:00.000Z";
  m.recipe_identity = "abc";
  m.layout = {{"world_size", "2"}};
  m.files = {{"model-00001-of-00001.safetensors", 100, std::string(32, 'a')}};
  m.tensors = {{"policy",
                "model",
                "w",
                "w",
                "model-00001-of-00001.safetensors",
                DType::kFp32,
                {4, 2},
                {{0, 0}, {4, 2}}}};
  return m;
}

// A text with a right trailer, so that only the field itself is wrong.
std::string signed_text(std::string body) { return body + "#xxh3:" + xxh3_128_hex(body) + "\n"; }

std::string body_with(const std::string& from, const std::string& to) {
  std::string text = to_text(make());
  text.resize(text.rfind("#xxh3:"));
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

TEST(Manifest, RoundTrip) {
  const Manifest read = parse_manifest(to_text(make()), "m");
  EXPECT_EQ(read.step, 12);
  EXPECT_EQ(read.layout.at("world_size"), "2");
  EXPECT_EQ(read.tensors.front().box, make().tensors.front().box);
  EXPECT_EQ(to_text(read), to_text(make()));
}

TEST(Manifest, UnsafeOrWrongFields_AreRefused) {
  const std::string name = "\"name\": \"model-00001-of-00001.safetensors\"";
  for (const char* bad : {"../x", "/etc/passwd", "a/b", ".hidden", ""})
    EXPECT_THROW((void)parse_manifest(
                     signed_text(body_with(name, "\"name\": \"" + std::string(bad) + "\"")), "m"),
                 DataError)
        << bad;
  EXPECT_THROW(
      (void)parse_manifest(signed_text(body_with("\"version\": 1", "\"version\": 2")), "m"),
      DataError);
  EXPECT_THROW(
      (void)parse_manifest(signed_text(body_with("\"dtype\": \"F32\"", "\"dtype\": \"F77\"")), "m"),
      DataError);
  EXPECT_THROW((void)parse_manifest(signed_text(body_with("\"step\": 12", "\"step\": -1")), "m"),
               DataError);
  EXPECT_THROW(
      (void)parse_manifest(signed_text(body_with("\"file\": \"model-", "\"file\": \"other-")), "m"),
      DataError);
  EXPECT_THROW(
      (void)parse_manifest(signed_text(body_with("   4,\n    2\n   ]", "   9,\n    2\n   ]")), "m"),
      DataError);
  EXPECT_THROW(
      (void)parse_manifest(body_with("abc", "abd") + "#xxh3:" + std::string(32, '0') + "\n", "m"),
      DataError);
}

TEST(Manifest, SeededMutations_AreReadOrRefused) {
  const std::string good = to_text(make());
  std::mt19937_64 random(7);
  for (int i = 0; i < 10'000; ++i) {
    std::string body = good.substr(0, good.rfind("#xxh3:"));
    for (int e = 0; e < 3; ++e) body[random() % body.size()] = "0{}[],:\"9-e."[random() % 12];
    try {
      (void)parse_manifest(signed_text(body), "mutated");
    } catch (const Error&) {
    }
  }
}

}  // namespace
}  // namespace capstan::checkpoint
