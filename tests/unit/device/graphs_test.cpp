// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Graphs, their memory and their branches through the accelerator's interface: on the fake device,
// and on a GPU.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <functional>
#include <vector>

#include "capstan/device/accelerator.h"

namespace capstan::device {
namespace {

// Work on a stream apart, behind and before the current one.
class Graphs : public ::testing::Test {
 public:
  ~Graphs() override {
    for (const Graph graph : graphs_) a_.destroy(graph);
    a_.destroy(pool_);
    for (const Event event : {turn_, fork_, join_}) a_.destroy(event);
  }

 protected:
  void run(const std::function<void()>& work) {
    in_turn([&] {
      a_.begin_allocating(pool_);
      work();
      a_.end_allocating(pool_);
    });
  }
  void record(const std::function<void()>& work) {
    in_turn([&] {
      a_.begin_capture(pool_);
      work();
      graphs_.push_back(a_.end_capture());
    });
  }
  void launch() {
    for (const Graph graph : graphs_) a_.launch(graph);
  }
  void in_turn(const std::function<void()>& work) {
    const Stream here = a_.current_stream();
    a_.record(turn_, here);
    a_.wait(apart_, turn_);
    {
      const StreamGuard guard(a_, apart_);
      work();
    }
    a_.record(turn_, apart_);
    a_.wait(here, turn_);
  }

  Accelerator& a_ = *accelerator();
  const Stream apart_ = a_.create_stream(false), other_ = a_.create_stream(true);
  const Event turn_ = a_.create_event(), fork_ = a_.create_event(), join_ = a_.create_event();
  const Pool pool_ = a_.create_pool();
  std::vector<Graph> graphs_;
};

TEST_F(Graphs, LieInTheMemoryOfTheWorkBeforeThem) {
  const at::Tensor x = at::ones({1 << 20}, a_.device());
  at::Tensor kept;
  const auto first = [&] { kept = (x * 2).add(1); };
  const auto second = [&] { x.copy_(kept.mul(3).sub(kept)); };
  for (int i = 0; i < 2; ++i) {
    run(first);
    run(second);
  }
  const int64_t reserved = a_.memory().reserved_bytes;
  record(first);
  record(second);
  EXPECT_EQ(a_.memory().reserved_bytes, reserved);
  const at::Tensor beside = x * 1;  // takes nothing of theirs
  launch();
  launch();
  EXPECT_EQ(beside.min().item<float>(), 26);
  EXPECT_EQ(x.min().item<float>(), 426);  // x = 2 (2 x + 1): 1, 6, 26, 106, 426
  EXPECT_EQ(x.max().item<float>(), 426);
}

TEST_F(Graphs, HaveBranchesOnOtherStreams) {
  const at::Tensor x = at::ones({64}, a_.device()), y = at::ones({64}, a_.device());
  EXPECT_FALSE(a_.is_capturing());
  record([&] {
    EXPECT_TRUE(a_.is_capturing());
    a_.record(fork_, apart_);
    a_.wait(other_, fork_);
    {
      const StreamGuard guard(a_, other_);
      y.mul_(3);
    }
    a_.record(join_, other_);
    x.mul_(2);
    a_.wait(apart_, join_);
    x.add_(y);
  });
  EXPECT_FALSE(a_.is_capturing());
  launch();
  launch();
  EXPECT_EQ(y.max().item<float>(), 9);
  EXPECT_EQ(x.max().item<float>(), 19);  // 2 * (2 * 1 + 3) + 9
}

}  // namespace
}  // namespace capstan::device
