// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Backward on the fake device: LibTorch's device thread, streams, custom nodes, thread ranks.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/custom_function.h>

#include <atomic>
#include <barrier>
#include <thread>

#include "support/fake_device/fake_device.h"

namespace capstan::test {
namespace {

using device::Event;
using device::Stream;
using device::StreamGuard;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

thread_local std::barrier<>* meeting = nullptr;

// y = 3 x^2, with what its backward saw.
struct Square : torch::autograd::Function<Square> {
  static inline std::atomic<std::thread::id> backward_thread;
  static inline std::atomic<void*> backward_stream;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x) {
    ctx->save_for_backward({x});
    at::Tensor y = at::empty_like(x);
    at::mul_out(y, x, x);
    return y.mul_(3);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    backward_thread = std::this_thread::get_id();
    backward_stream = install_fake_device().current_stream().handle;
    if (meeting) meeting->arrive_and_wait();
    return {grads[0] * ctx->get_saved_variables()[0] * 6};
  }
};

class FakeDeviceAutograd : public ::testing::Test {
 protected:
  FakeDeviceAutograd() : gpu_(install_fake_device()), options_(at::device(fake_device())) {}
  void order(Stream earlier, Stream later) {
    const Event event = gpu_.create_event();
    gpu_.record(event, earlier);
    gpu_.wait(later, event);
    gpu_.destroy(event);
  }
  [[nodiscard]] at::Tensor leaf(int64_t n, float value) const {
    return at::full({n}, value, options_).set_requires_grad(true);
  }

  device::Accelerator& gpu_;
  const at::TensorOptions options_;
};

TEST_F(FakeDeviceAutograd, CustomNode_RunsOnTheDeviceThreadWithoutHostWait) {
  const at::Tensor x = leaf(4, 2);
  const int64_t before = host_syncs();
  Square::apply(x).sum().backward();
  EXPECT_EQ(host_syncs(), before);
  EXPECT_NE(Square::backward_thread.load(), std::this_thread::get_id());
  EXPECT_EQ(x.grad().sum().item<float>(), 48);
  const BackwardOnThisThread guard;
  Square::apply(x).sum().backward();
  EXPECT_EQ(Square::backward_thread.load(), std::this_thread::get_id());
  EXPECT_EQ(x.grad().sum().item<float>(), 96);
}

TEST_F(FakeDeviceAutograd, Backward_RunsOnTheForwardsStream) {
  const Stream side = gpu_.create_stream(false), main = gpu_.current_stream();
  const at::Tensor x = leaf(4, 2);
  order(main, side);
  at::Tensor loss;
  {
    const StreamGuard guard(gpu_, side);
    loss = Square::apply(x).sum();
  }
  order(side, main);
  loss.backward();
  EXPECT_EQ(Square::backward_stream.load(), side.handle);
  EXPECT_EQ(x.grad().sum().item<float>(), 48);  // ordered behind backward by LibTorch
}

TEST_F(FakeDeviceAutograd, BranchesOnTwoStreams_MeetInOneGradient) {
  const Stream main = gpu_.current_stream();
  const Stream sides[] = {gpu_.create_stream(false), gpu_.create_stream(true)};
  const at::Tensor x = leaf(4, 2);
  at::globalContext().setWarnOnAccumulateGradStreamMismatch(false);
  for (int step = 1; step <= 3; ++step) {
    std::vector<at::Tensor> branches;
    for (const Stream side : sides) {
      order(main, side);
      const StreamGuard guard(gpu_, side);
      branches.push_back(Square::apply(x));
      order(side, main);
    }
    at::add(branches[0], branches[1]).sum().backward();
    for (const at::Tensor& branch : branches) gpu_.keep_for(branch, main);
    EXPECT_EQ(x.grad().sum().item<float>(), 96.0F * static_cast<float>(step));
  }
}

TEST_F(FakeDeviceAutograd, SideWorkInsideAStep_IsOrderedByEventsAlone) {
  const Stream side = gpu_.create_stream(false), main = gpu_.current_stream();
  const at::Tensor weight = leaf(6, 1);
  const at::Tensor shard = at::full({6}, 5, options_);
  const int64_t before = host_syncs();
  order(main, side);
  at::Tensor gathered;
  {
    const StreamGuard guard(gpu_, side);
    gathered = shard * 2;
  }
  EXPECT_THROW((void)(weight * gathered).sum(), MissingWait);
  order(side, main);
  (weight * gathered).sum().backward();
  gpu_.keep_for(gathered, main);
  gathered.reset();
  EXPECT_EQ(host_syncs(), before);
  EXPECT_EQ(weight.grad().sum().item<float>(), 60);
}

TEST_F(FakeDeviceAutograd, MissingWaitInBackward_ReachesTheCaller) {
  const Stream side = gpu_.create_stream(false), main = gpu_.current_stream();
  const at::Tensor x = leaf(4, 2), factor = at::full({4}, 3, options_);
  const at::Tensor loss = (x * factor).sum();
  order(main, side);
  {
    const StreamGuard guard(gpu_, side);
    const at::NoGradGuard no_grad;
    factor.data().mul_(2);  // backward reads it; no version check sees it
  }
  EXPECT_THROW(loss.backward(), MissingWait);
  order(side, main);
}

TEST_F(FakeDeviceAutograd, ThreadRanks_MeetInsideBackward) {
  constexpr int kRanks = 3;
  std::barrier<> barrier(kRanks);
  std::vector<std::thread> ranks;
  std::atomic<int> wrong = 0;
  for (int rank = 0; rank < kRanks; ++rank)
    ranks.emplace_back([&, rank] {
      const BackwardOnThisThread guard;
      meeting = &barrier;
      const at::Tensor x = leaf(4, static_cast<float>(rank));
      for (int i = 0; i < 20; ++i) Square::apply(x).sum().backward();
      if (x.grad().sum().item<float>() != static_cast<float>(rank) * 480) ++wrong;
    });
  for (auto& rank : ranks) rank.join();
  EXPECT_EQ(wrong, 0);
}

TEST_F(FakeDeviceAutograd, TwoLayerModel_HasTheCpusGradients) {
  const auto train = [](const c10::Device& device) {
    at::manual_seed(5);
    std::vector<at::Tensor> w = {at::randn({16, 8}), at::randn({8, 16}), at::ones({8})};
    for (at::Tensor& t : w) t = t.to(device).set_requires_grad(true);
    const at::Tensor x = at::randn({5, 8}).to(device);
    for (int step = 0; step < 3; ++step) {
      const at::Tensor hidden = at::silu(at::linear(at::rms_norm(x, {8}, w[2]), w[0]));
      at::log_softmax(at::linear(hidden, w[1]), -1).select(1, 3).mean().neg().backward();
      const at::NoGradGuard no_grad;
      for (at::Tensor& t : w) {
        t.add_(t.grad(), -0.5);
        t.mutable_grad().reset();
      }
    }
    for (at::Tensor& t : w) t = t.detach().cpu();
    return w;
  };
  const auto host = train(at::kCPU), device = train(fake_device());
  for (size_t i = 0; i < host.size(); ++i) EXPECT_TRUE(at::equal(host[i], device[i])) << i;
}

}  // namespace
}  // namespace capstan::test
