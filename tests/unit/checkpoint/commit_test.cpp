// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/checkpoint/commit.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <barrier>
#include <cstring>
#include <fstream>
#include <numeric>
#include <thread>

#include "capstan/base/error.h"
#include "capstan/checkpoint/load.h"
#include "capstan/checkpoint/safetensors.h"
#include "support/commit_group.h"
#include "support/temp_dir.h"

namespace capstan::checkpoint {
namespace {

using testing::HasSubstr;

// A tensor [rows, 4] holding 0, 1, 2, ... cut into row ranges over the ranks.
struct Owner {
  std::vector<float> values;
  StateBlob blob;
};
Owner make_rows(const std::string& kind, int64_t rows, int64_t begin, int64_t end, bool filled) {
  Owner o;
  o.values.resize(static_cast<size_t>((end - begin) * 4));
  if (filled) std::iota(o.values.begin(), o.values.end(), static_cast<float>(begin * 4));
  o.blob = {
      "policy", kind, "model.x.weight", {rows, 4}, {{begin, 0}, {end - begin, 4}}, DType::kFp32,
      {},       true};
  return o;
}
StateBlob bound(Owner& o) {
  o.blob.bytes = std::as_writable_bytes(std::span(o.values));
  return o.blob;
}

Path save_over(const Path& directory, int ranks, int64_t step) {
  run_with_group(ranks, [&](CommitGroup& group) {
    const int64_t rows = 12, per = rows / group.size(), begin = per * group.rank();
    Owner weights = make_rows("model", rows, begin, begin + per, true),
          moments = make_rows("optimizer.exp_avg", rows, begin, begin + per, true);
    SaveRequest request{.directory = directory,
                        .step = step,
                        .state = {bound(weights), bound(moments)},
                        .recipe_identity = "r"};
    if (group.rank() == 0) request.files = {{"state.json", "{}"}};
    (void)save_step(request, group);
  });
  return directory / step_folder_name(step);
}

FoundStep open_step(const Path& path) {
  SoloGroup solo;
  return {path, verify_step(path, Verify::kFull, solo)};
}

class Commit : public testing::Test {
 protected:
  test::TempDir dir_;
  Path directory_ = dir_.path() / "checkpoints";
  void SetUp() override { std::filesystem::create_directories(directory_); }
};

TEST_F(Commit, Save_LeavesOneWholeFolder) {
  const Path step = save_over(directory_, 2, 300);
  EXPECT_EQ(list_steps(directory_).size(), 1u);
  EXPECT_FALSE(std::filesystem::exists(directory_ / "step-00000300.partial"));
  EXPECT_EQ(read_file(directory_ / "latest"), "step-00000300\n");
  EXPECT_TRUE(std::filesystem::exists(step / "model-00002-of-00002.safetensors"));
  const FoundStep found = open_step(step);
  EXPECT_EQ(found.manifest.step, 300);
  EXPECT_EQ(found.manifest.files.size(), 5u);
}

TEST_F(Commit, AnyRankCount_LoadsUnderAnyOther) {
  for (const int saved : {1, 2, 3, 4}) {
    const Path step = save_over(directory_, saved, saved);
    const FoundStep found = open_step(step);
    for (const int parts : {1, 2, 6}) {
      for (int part = 0; part < parts; ++part) {
        const int64_t per = 12 / parts;
        Owner weights = make_rows("model", 12, part * per, (part + 1) * per, false);
        std::vector<StateBlob> blobs = {bound(weights)};
        EXPECT_EQ(load_state(found, blobs), per * 16);  // only what the part needs
        EXPECT_EQ(weights.values,
                  make_rows("model", 12, part * per, (part + 1) * per, true).values);
      }
    }
  }
}

TEST_F(Commit, ColumnsOfRowShards_LoadExactly) {
  const FoundStep found = open_step(save_over(directory_, 3, 1));
  std::vector<float> values(24);
  std::vector<StateBlob> blobs = {{"policy",
                                   "model",
                                   "model.x.weight",
                                   {12, 4},
                                   {{0, 1}, {12, 2}},
                                   DType::kFp32,
                                   std::as_writable_bytes(std::span(values)),
                                   true}};
  (void)load_state(found, blobs);
  for (int64_t row = 0; row < 12; ++row)
    for (int64_t column = 0; column < 2; ++column)
      EXPECT_EQ(values[row * 2 + column], static_cast<float>(row * 4 + column + 1));
}

TEST_F(Commit, AVeto_FailsOnEveryRankAndCommitsNothing) {
  std::atomic<int> failed{0};
  run_with_group(2, [&](CommitGroup& group) {
    Owner weights = make_rows("model", 12, group.rank() * 6, group.rank() * 6 + 6, true);
    SaveRequest request{.directory = directory_, .step = 5, .state = {bound(weights)}};
    if (group.rank() == 1) {  // a second tensor of the same name in the same file cannot be written
      request.state.push_back(request.state.front());
    }
    try {
      (void)save_step(request, group);
    } catch (const EnvError& error) {
      EXPECT_THAT(error.what(), HasSubstr("rank 1"));
      ++failed;
    }
  });
  EXPECT_EQ(failed, 2);
  EXPECT_TRUE(list_steps(directory_).empty());
}

TEST_F(Commit, ACommittedStep_IsNeverReplaced) {
  const Path step = save_over(directory_, 1, 7);
  const std::string before = read_file(step / "manifest.json");
  save_over(directory_, 2, 7);
  EXPECT_EQ(read_file(step / "manifest.json"), before);
}

TEST_F(Commit, Retention_KeepsByRuleAndClearsLeftovers) {
  for (const int64_t step : {100, 200, 300, 400, 500}) save_over(directory_, 1, step);
  std::filesystem::create_directories(directory_ / "step-00000450.partial" / "abc");
  std::filesystem::create_directories(directory_ / "step-00000460");  // its manifest is gone
  apply_retention(directory_, {.keep_last = 2, .keep_every_steps = 300});
  std::vector<int64_t> left;
  for (const CommittedStep& s : list_steps(directory_)) left.push_back(s.step);
  EXPECT_EQ(left, (std::vector<int64_t>{500, 400, 300}));
  EXPECT_FALSE(std::filesystem::exists(directory_ / "step-00000450.partial"));
  EXPECT_FALSE(std::filesystem::exists(directory_ / "step-00000460"));
  apply_retention(directory_, {.keep_last = 0});
  EXPECT_EQ(list_steps(directory_).size(), 1u);  // the newest stays whatever the rules say
}

TEST_F(Commit, Steps_AreComparedAsNumbers) {
  save_over(directory_, 1, 99'999'999);
  save_over(directory_, 1, 100'000'000);
  EXPECT_EQ(list_steps(directory_).front().step, 100'000'000);
  EXPECT_EQ(step_of_folder("step-300"), std::nullopt);
  EXPECT_EQ(step_of_folder("step-00000300.partial"), std::nullopt);
}

// Each entry damages a good step; loading must name the file and fall back to the older one.
struct Damage {
  const char* name;
  void (*apply)(const Path& step);
};
void flip_byte(const Path& file, std::streamoff at) {
  std::fstream f(file, std::ios::in | std::ios::out | std::ios::binary);
  f.seekg(at, at < 0 ? std::ios::end : std::ios::beg);
  const char byte = static_cast<char>(f.peek() ^ 1);
  f.seekp(at, at < 0 ? std::ios::end : std::ios::beg);
  f.put(byte);
}
class DamagedStep : public testing::TestWithParam<Damage> {};

TEST_P(DamagedStep, IsPassedOverForTheOlderOne) {
  const test::TempDir dir;
  save_over(dir.path(), 2, 100);
  const Path newest = save_over(dir.path(), 2, 200);
  GetParam().apply(newest);
  SoloGroup solo;
  const auto found = find_newest_good_step(dir.path(), Verify::kFull, solo);
  ASSERT_TRUE(found);
  EXPECT_EQ(found->manifest.step, 100);
}

const Path kShard = "model-00001-of-00002.safetensors", kOther = "model-00002-of-00002.safetensors";
INSTANTIATE_TEST_SUITE_P(
    Table, DamagedStep,
    testing::Values(
        Damage{"missing_shard", [](const Path& s) { std::filesystem::remove(s / kShard); }},
        Damage{"short_shard",
               [](const Path& s) {
                 std::filesystem::resize_file(s / kShard,
                                              std::filesystem::file_size(s / kShard) - 1);
               }},
        Damage{"flipped_bit", [](const Path& s) { flip_byte(s / kShard, -3); }},
        Damage{"zero_filled",
               [](const Path& s) {
                 const auto n = std::filesystem::file_size(s / kShard);
                 std::ofstream(s / kShard) << std::string(n, '\0');
               }},
        Damage{"swapped",
               [](const Path& s) {
                 std::filesystem::rename(s / kShard, s / "t");
                 std::filesystem::rename(s / kOther, s / kShard);
                 std::filesystem::rename(s / "t", s / kOther);
               }},
        Damage{"edited_manifest", [](const Path& s) { flip_byte(s / "manifest.json", 40); }},
        Damage{"cut_manifest",
               [](const Path& s) { std::filesystem::resize_file(s / "manifest.json", 100); }},
        Damage{"empty_manifest",
               [](const Path& s) { std::filesystem::resize_file(s / "manifest.json", 0); }},
        Damage{"link_out",
               [](const Path& s) {
                 std::filesystem::rename(s / kShard, s.parent_path() / "out");
                 std::filesystem::create_symlink("../out", s / kShard);
               }},
        Damage{
            "wrong_folder_name",
            [](const Path& s) { std::filesystem::rename(s, s.parent_path() / "step-00000300"); }}),
    [](const auto& which) { return which.param.name; });

TEST_F(Commit, NoGoodStep_IsAnIntegrityError) {
  const Path step = save_over(directory_, 1, 100);
  std::filesystem::resize_file(step / "manifest.json", 10);
  SoloGroup solo;
  try {
    (void)find_newest_good_step(directory_, Verify::kFull, solo);
    FAIL();
  } catch (const DataError& error) {
    EXPECT_EQ(error.exit_code(), 94);
    EXPECT_THAT(error.what(), HasSubstr("manifest.json"));
  }
}

TEST_F(Commit, PointerFile_IsOnlyAHint) {
  save_over(directory_, 1, 100);
  for (const char* content : {"", "garbage\n", "step-00000999\n"}) {
    std::ofstream(directory_ / "latest") << content;
    SoloGroup solo;
    EXPECT_EQ(find_newest_good_step(directory_, Verify::kFull, solo)->manifest.step, 100);
  }
}

TEST_F(Commit, WhatDoesNotFit_IsListedAtOnce) {
  const FoundStep found = open_step(save_over(directory_, 1, 1));
  std::vector<float> a(8), c(48);
  std::vector<double> b(48);
  std::vector<StateBlob> blobs = {{"policy",
                                   "model",
                                   "model.x.weight",
                                   {2, 4},
                                   {{0, 0}, {2, 4}},
                                   DType::kFp32,
                                   std::as_writable_bytes(std::span(a)),
                                   true},
                                  {"policy",
                                   "optimizer.exp_avg",
                                   "model.x.weight",
                                   {12, 4},
                                   {{0, 0}, {12, 4}},
                                   DType::kFp64,
                                   std::as_writable_bytes(std::span(b)),
                                   true},
                                  {"policy",
                                   "model",
                                   "model.other.weight",
                                   {12, 4},
                                   {{0, 0}, {12, 4}},
                                   DType::kFp32,
                                   std::as_writable_bytes(std::span(c)),
                                   true}};
  try {
    (void)load_state(found, blobs);
    FAIL();
  } catch (const DataError& error) {
    for (const char* words :
         {"3 tensors", "shape [12, 4], need [2, 4]", "stored as fp32, need fp64",
          "model.other.weight is not in the checkpoint"})
      EXPECT_THAT(error.what(), HasSubstr(words));
  }
}

TEST_F(Commit, AnotherModel_IsAUsageError) {
  const FoundStep found = open_step(save_over(directory_, 1, 1));
  std::vector<float> a(8);
  std::vector<StateBlob> blobs = {{"policy",
                                   "model",
                                   "model.y.weight",
                                   {2, 4},
                                   {{0, 0}, {2, 4}},
                                   DType::kFp32,
                                   std::as_writable_bytes(std::span(a)),
                                   true}};
  EXPECT_THROW((void)load_state(found, blobs), ConfigError);
}

TEST_F(Commit, ModelDirectory_IsARunOrAStep) {
  const Path step = save_over(directory_, 1, 42);
  EXPECT_EQ(open_model_directory(dir_.path(), Verify::kFull).manifest.step, 42);
  EXPECT_EQ(open_model_directory(step, Verify::kFast).manifest.step, 42);
  EXPECT_THROW((void)open_model_directory(dir_.path() / "nothing", Verify::kFull), ConfigError);
}

}  // namespace
}  // namespace capstan::checkpoint
