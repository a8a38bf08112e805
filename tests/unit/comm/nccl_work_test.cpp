// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "comm/nccl_work_internal.h"

#include <gtest/gtest.h>

#include <set>

#include "support/fake_accelerator.h"

namespace capstan::comm {
namespace {

class Book final : public WaitBook {
 public:
  std::function<void()> while_noting = [] {};
  std::set<int64_t> open;

  void count(const std::string&) override {}
  int64_t note_wait(WaitNote, std::function<void()>) override {
    while_noting();
    open.insert(next_);
    return next_++;
  }
  void clear_wait(int64_t id) override { EXPECT_EQ(open.erase(id), 1U); }
  std::exception_ptr fail(const WaitFailure&, const WaitNote&) override { return nullptr; }
  void abort(const std::string&) noexcept override {}
  bool is_aborted() const override { return false; }
  AbortedError aborted_error(const std::string&) const override {
    return AbortedError(ErrorText{});
  }

 private:
  int64_t next_ = 0;
};

std::shared_ptr<NcclWork> make_work(const std::shared_ptr<Book>& book,
                                    device::Accelerator& accelerator) {
  const auto state = std::make_shared<RankState>(0, 60.0);
  const int64_t flight = state->recorder.add({.axis = "dp[0,1]", .sequence = 0, .what = "barrier"});
  return std::make_shared<NcclWork>(
      std::make_shared<NcclDevice>(nullptr, accelerator, book, state), Request{},
      NcclWork::Place{.note = {.title = "barrier #0"}, .counter = "nccl", .flight = flight});
}

TEST(NcclWork, NoteOfItsWait_IsClearedAtItsEnd) {
  const auto accelerator = std::make_shared<test::FakeAccelerator>();
  const auto book = std::make_shared<Book>();
  const auto work = make_work(book, *accelerator);
  work->note_wait();
  work->note_wait();
  EXPECT_EQ(book->open.size(), 1U);
  work->finish();
  EXPECT_TRUE(book->open.empty());
}

// The watcher notes a wait while the thread that waited learns of the end.
TEST(NcclWork, NoteOfAWaitThatEndsMeanwhile_IsCleared) {
  const auto accelerator = std::make_shared<test::FakeAccelerator>();
  const auto book = std::make_shared<Book>();
  const auto done = make_work(book, *accelerator), failed = make_work(book, *accelerator);
  book->while_noting = [&] { done->finish(); };
  done->note_wait();
  EXPECT_TRUE(book->open.empty());
  book->while_noting = [&] { failed->fail(std::make_exception_ptr(AbortedError(ErrorText{}))); };
  failed->note_wait();
  EXPECT_TRUE(book->open.empty());
}

}  // namespace
}  // namespace capstan::comm
