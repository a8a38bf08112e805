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

// On a stream of its own, ordered behind and before the default one.
device::Graph record(const std::function<void()>& work) {
  device::Accelerator& a = install_fake_device();
  const device::Stream here = a.current_stream(), apart = a.create_stream(false);
  const device::Event event = a.create_event();
  a.record(event, here);
  a.wait(apart, event);
  device::Graph graph;
  std::exception_ptr failure;
  {
    const device::StreamGuard guard(a, apart);
    a.begin_capture();
    try {
      work();
    } catch (...) {
      failure = std::current_exception();
    }
    graph = a.end_capture();
  }
  a.record(event, apart);
  a.wait(here, event);
  a.destroy(event);
  if (!failure) return graph;
  a.destroy(graph);
  std::rethrow_exception(failure);
}

class FakeGraph : public ::testing::Test {
 public:
  FakeGraph() : accelerator_(install_fake_device()) {}

 protected:
  device::Accelerator& accelerator_;
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
  EXPECT_THROW(accelerator_.begin_capture(), c10::Error);
}

}  // namespace
}  // namespace capstan::test
