// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Graphs of the fake device: recorded ops take no effect, launches have that of the ops, and what a
// GPU would do wrong in silence throws.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <exception>

#include "support/fake_device/fake_device.h"

namespace capstan::test {
namespace {

at::Tensor on_device(std::vector<double> values) {
  return at::tensor(values, at::kDouble).to(fake_device());
}

class FakeGraph : public ::testing::Test {
 public:
  FakeGraph()
      : accelerator_(install_fake_device()),
        apart_(accelerator_.create_stream(false)),
        pool_(accelerator_.create_pool()) {}

 protected:
  // On a stream of its own, ordered behind and before the default one.
  void run_apart(const std::function<void()>& work) {
    device::Accelerator& a = accelerator_;
    const device::Stream here = a.current_stream();
    const device::Event event = a.create_event();
    a.record(event, here);
    a.wait(apart_, event);
    {
      const device::StreamGuard guard(a, apart_);
      work();
    }
    a.record(event, apart_);
    a.wait(here, event);
    a.destroy(event);
  }
  void run_in_pool(const std::function<void()>& work) {
    run_apart([&] {
      accelerator_.begin_allocating(pool_);
      work();
      accelerator_.end_allocating(pool_);
    });
  }
  device::Graph record(const std::function<void()>& work) {
    device::Graph graph;
    std::exception_ptr failure;
    run_apart([&] {
      accelerator_.begin_capture(pool_);
      try {
        work();
      } catch (...) {
        failure = std::current_exception();
      }
      graph = accelerator_.end_capture();
    });
    if (!failure) return graph;
    accelerator_.destroy(graph);
    std::rethrow_exception(failure);
  }

  device::Accelerator& accelerator_;
  const device::Stream apart_;
  const device::Pool pool_;
};

TEST_F(FakeGraph, ALaunchRepeatsWhatWasRecorded_TheCaptureItselfDoesNothing) {
  const at::Tensor x = on_device({1, 2, 3}), sum = on_device({0, 0, 0});
  const device::Graph graph = record([&] {
    const at::Tensor twice = x * 2;  // lives in the graph
    sum.add_(twice.narrow(0, 0, 3));
    sum.select(0, 1).fill_(7);
  });
  EXPECT_TRUE(at::equal(sum.cpu(), at::zeros({3}, at::kDouble)));
  const int64_t before = graph_launches();
  accelerator_.launch(graph);
  EXPECT_TRUE(at::equal(sum.cpu(), at::tensor({2.0, 7.0, 6.0}, at::kDouble)));
  x.copy_(at::tensor({10.0, 20.0, 30.0}, at::kDouble));
  accelerator_.launch(graph);
  EXPECT_TRUE(at::equal(sum.cpu(), at::tensor({22.0, 7.0, 66.0}, at::kDouble)));
  EXPECT_EQ(graph_launches() - before, 2);
  accelerator_.destroy(graph);
}

TEST_F(FakeGraph, MemoryThatWasFreedSince_IsNoticed) {
  at::Tensor x = on_device({1, 2, 3});
  const at::Tensor sum = on_device({0, 0, 0});
  const device::Graph graph = record([&] { sum.add_(x); });
  accelerator_.launch(graph);
  x = at::Tensor();
  EXPECT_THROW(accelerator_.launch(graph), c10::Error);
  accelerator_.destroy(graph);
}

TEST_F(FakeGraph, AHostWaitDuringACapture_Throws) {
  const at::Tensor x = on_device({1, 2, 3});
  EXPECT_THROW((void)record([&] { (void)x.sum().item<double>(); }), c10::Error);
  EXPECT_THROW((void)record([&] { (void)x.cpu(); }), c10::Error);
  EXPECT_EQ(x.sum().item<double>(), 6);
}

TEST_F(FakeGraph, TheDefaultStream_CannotBeCaptured) {
  EXPECT_THROW(accelerator_.begin_capture(pool_), c10::Error);
}

// A capture, and the one after it, take the memory that the work before them has left.
TEST_F(FakeGraph, GraphsOfAPool_TakeNoMoreMemoryThanTheWorkBefore) {
  constexpr int64_t kNumbers = 3001;  // a size of its own
  const at::Tensor x = at::ones({kNumbers}, fake_device());
  at::Tensor kept;
  const auto first = [&] { kept = (x * 2).add(1); };
  const auto second = [&] { x.copy_(kept.mul(3).sub(kept)); };
  run_in_pool(first);
  run_in_pool(second);
  const int64_t reserved = accelerator_.memory().reserved_bytes;
  const device::Graph graphs[] = {record(first), record(second)};
  EXPECT_EQ(accelerator_.memory().reserved_bytes, reserved);
  const at::Tensor other = x * 2;  // takes nothing of theirs
  EXPECT_GT(accelerator_.memory().reserved_bytes, reserved);
  for (int i = 0; i < 2; ++i)
    for (const device::Graph graph : graphs) accelerator_.launch(graph);
  EXPECT_EQ(x[0].item<float>(), 106);  // x = 2 (2 x + 1), from 1, once and twice more
  EXPECT_EQ(other[0].item<float>(), 12);
  EXPECT_THROW(run_in_pool(first), c10::Error);
  EXPECT_THROW(accelerator_.destroy(pool_), c10::Error);
  for (const device::Graph graph : graphs) accelerator_.destroy(graph);
  accelerator_.destroy(pool_);
}

TEST_F(FakeGraph, OtherStreams_ArePartOfACaptureFromForkToJoin) {
  device::Accelerator& a = accelerator_;
  const device::Stream other = a.create_stream(false);
  const device::Event fork = a.create_event(), join = a.create_event();
  EXPECT_THROW((void)record([&] { a.record(join, other); }), c10::Error);
  EXPECT_THROW((void)record([&] { a.wait(other, fork); }), c10::Error);
  const auto forked = [&] {
    a.record(fork, a.current_stream());
    a.wait(other, fork);
    a.record(join, other);
  };
  EXPECT_THROW((void)record(forked), c10::Error);  // not joined
  EXPECT_THROW((void)a.is_done(join), c10::Error);
  EXPECT_THROW(a.wait(a.current_stream(), join), c10::Error);
  const device::Graph graph = record([&] {
    forked();
    a.wait(a.current_stream(), join);
  });
  a.launch(graph);
  a.destroy(graph);
  a.record(join, a.current_stream());
  a.wait(other, join);
  a.destroy(fork);
  a.destroy(join);
}

}  // namespace
}  // namespace capstan::test
