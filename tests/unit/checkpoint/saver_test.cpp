// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/checkpoint/saver.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <ATen/ATen.h>

#include "support/temp_dir.h"

namespace capstan::checkpoint {
namespace {

std::vector<mesh::StateEntry> entries_of(const at::Tensor& tensor) {
  return {{"policy", "model", "w", {tensor.numel()}, {{0}, {tensor.numel()}}, tensor, true}};
}

SaveRequest request_for(const Path& directory, int64_t step, const at::Tensor& tensor) {
  return {.directory = directory, .step = step, .state = blobs_of(entries_of(tensor))};
}

TEST(Saver, Asynchronous_SavesTheStateOfItsStart) {
  const test::TempDir dir;
  at::Tensor w = at::arange(1000, at::kFloat);
  Saver saver(std::make_unique<SoloGroup>(), {}, true);
  saver.start(request_for(dir.path(), 1, w));
  w.fill_(-1);  // training goes on
  const auto outcome = saver.wait();
  ASSERT_TRUE(outcome);
  EXPECT_EQ(outcome->error, "");
  at::Tensor read = at::empty(1000, at::kFloat);
  std::vector<StateBlob> blobs = blobs_of(entries_of(read));
  (void)load_state(open_model_directory(outcome->path, Verify::kFull), blobs);
  EXPECT_TRUE(at::equal(read, at::arange(1000, at::kFloat)));
  EXPECT_FALSE(saver.wait());  // reported once
}

TEST(Saver, AFailedSave_IsReportedAndTheNextOneWorks) {
  const test::TempDir dir;
  const at::Tensor w = at::ones(10);
  Saver saver(std::make_unique<SoloGroup>(), {}, true);
  saver.start(request_for("/proc/none", 1, w));
  const auto failed = saver.wait();
  ASSERT_TRUE(failed);
  EXPECT_THAT(failed->error, testing::HasSubstr("/proc/none"));
  saver.start(request_for(dir.path(), 2, w));
  EXPECT_EQ(saver.wait()->error, "");
}

TEST(Saver, Retention_RunsAfterTheCommit) {
  const test::TempDir dir;
  const at::Tensor w = at::ones(10);
  Saver saver(std::make_unique<SoloGroup>(), {.keep_last = 2}, false);
  for (int64_t step = 1; step <= 4; ++step) {
    saver.start(request_for(dir.path(), step, w));
    EXPECT_EQ(saver.poll()->error, "");
  }
  std::vector<int64_t> left;
  for (const CommittedStep& s : list_steps(dir.path())) left.push_back(s.step);
  EXPECT_EQ(left, (std::vector<int64_t>{4, 3}));
}

}  // namespace
}  // namespace capstan::checkpoint
