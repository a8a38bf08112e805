// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "support/fake_device/fake_device.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <thread>

#include "capstan/base/error.h"

namespace capstan::test {
namespace {

using device::Event;
using device::Stream;
using device::StreamGuard;
using ::testing::AllOf;
using ::testing::HasSubstr;

class FakeDevice : public ::testing::Test {
 protected:
  FakeDevice() : gpu_(install_fake_device()), on_device_(at::device(fake_device())) {}

  template <class Fn>
  static std::string message_of(Fn&& fn) {
    try {
      fn();
    } catch (const std::exception& e) {
      return e.what();
    }
    return "nothing was thrown";
  }
  // Orders `later` behind what is queued on `earlier`.
  void order(Stream earlier, Stream later) {
    const Event event = gpu_.create_event();
    gpu_.record(event, earlier);
    gpu_.wait(later, event);
    gpu_.destroy(event);
  }

  device::Accelerator& gpu_;
  const at::TensorOptions on_device_;
};

TEST_F(FakeDevice, Install_IsTheAcceleratorOfTheProcess) {
  EXPECT_EQ(device::accelerator(), &gpu_);
  EXPECT_EQ(&install_fake_device(), &gpu_);
  EXPECT_EQ(device::run_device().str(), "fake:0");
  EXPECT_EQ(gpu_.device_count(), 1);
  gpu_.set_device(0);
  EXPECT_THROW(gpu_.set_device(1), EnvError);
}

TEST_F(FakeDevice, HostAccess_Crashes) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const at::Tensor t = at::ones({4}, on_device_);
  EXPECT_DEATH(
      {
        const volatile float* const raw = t.const_data_ptr<float>();
        std::fprintf(stderr, "read %g\n", static_cast<double>(*raw));
      },
      "^$|SEGV");
  EXPECT_EQ(static_cast<float*>(host_of(t.data_ptr()))[3], 1);
  EXPECT_EQ(host_view(t).sum().item<float>(), 4);
}

TEST_F(FakeDevice, NewAndFreedMemory_HoldsNaN) {
  at::Tensor t = at::empty({1000}, on_device_);
  EXPECT_TRUE(t.isnan().all().item<bool>());
  const void* const bytes = host_of(t.data_ptr());
  t.fill_(1);
  t.reset();
  EXPECT_TRUE(std::isnan(*static_cast<const float*>(bytes)));
}

TEST_F(FakeDevice, KernelPastTheEnd_EndsTheProgram) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_DEATH(
      {
        const at::Tensor t = at::zeros({7}, on_device_);
        static_cast<float*>(host_of(t.data_ptr()))[7] = 0;
      },
      "wrote past the end of 28 bytes");
}

TEST_F(FakeDevice, KernelOnRawPointers_IsChecked) {
  const Stream side = gpu_.create_stream(false);
  at::Tensor t = at::zeros({8}, on_device_);
  const void* const pointer = t.data_ptr();
  note_access(pointer, 32, /*is_write=*/true, "kernel");
  EXPECT_THAT(message_of([&] { note_access(pointer, 33, false, "kernel"); }),
              HasSubstr("kernel goes past the end"));
  {
    const StreamGuard guard(gpu_, side);
    EXPECT_THROW(note_access(t, false, "kernel"), MissingWait);
  }
  (void)host_of(static_cast<const float*>(pointer) + 8);  // of no elements
  t.reset();
  EXPECT_THAT(message_of([&] { (void)host_of(pointer); }), HasSubstr("freed memory"));
}

TEST_F(FakeDevice, Memory_IsCountedAndReused) {
  const int64_t before = gpu_.memory().allocated_bytes;
  gpu_.reset_peak();
  void* first = nullptr;
  {
    const at::Tensor t = at::empty({1000}, on_device_.dtype(at::kByte));
    first = t.data_ptr();
    EXPECT_EQ(gpu_.memory().allocated_bytes - before, 1024);
  }
  EXPECT_EQ(gpu_.memory().allocated_bytes, before);
  EXPECT_EQ(gpu_.memory().peak_bytes - before, 1024);
  EXPECT_EQ(at::empty({600}, on_device_.dtype(at::kByte)).data_ptr(), first);
}

TEST_F(FakeDevice, TooMuchMemory_IsRefused) {
  const int64_t total = gpu_.memory().total_bytes;
  set_fake_memory_bytes(gpu_.memory().allocated_bytes + 4096);
  EXPECT_THROW((void)at::empty({2048}, on_device_), c10::OutOfMemoryError);
  set_fake_memory_bytes(total);
}

TEST_F(FakeDevice, OtherStreamsData_NeedsAWait) {
  const Stream side = gpu_.create_stream(false), main = gpu_.current_stream();
  at::Tensor t;
  {
    const StreamGuard guard(gpu_, side);
    t = at::ones({8}, on_device_);
  }
  EXPECT_THAT(message_of([&] { (void)t.add(1); }),
              AllOf(HasSubstr("missing wait"), HasSubstr("aten::add"), HasSubstr("aten::fill_")));
  EXPECT_THROW((void)t.cpu(), MissingWait);
  EXPECT_THROW((void)t.sum(), MissingWait);
  order(side, main);
  EXPECT_EQ(t.add(1).sum().item<float>(), 16);
}

TEST_F(FakeDevice, EventRecordedTooEarly_IsNoWait) {
  const Stream side = gpu_.create_stream(false), main = gpu_.current_stream();
  const at::Tensor t = at::ones({8}, on_device_);
  order(main, side);
  const Event early = gpu_.create_event();
  gpu_.record(early, side);
  {
    const StreamGuard guard(gpu_, side);
    t.mul_(2);
  }
  gpu_.wait(main, early);
  EXPECT_THROW((void)t.sum(), MissingWait);
  gpu_.synchronize(early);
  EXPECT_THROW((void)t.sum(), MissingWait);
  gpu_.synchronize(side);  // the host waits: later work of any stream is behind it
  EXPECT_EQ(t.sum().item<float>(), 16);
  gpu_.destroy(early);
}

TEST_F(FakeDevice, WriteOverAnotherStreamsRead_NeedsAWait) {
  const Stream side = gpu_.create_stream(false), main = gpu_.current_stream();
  const at::Tensor t = at::ones({8}, on_device_);
  order(main, side);
  at::Tensor sum;
  {
    const StreamGuard guard(gpu_, side);
    sum = t.sum();
  }
  EXPECT_EQ(t.mean().item<float>(), 1);  // two readers do not disturb each other
  EXPECT_THAT(message_of([&] { t.zero_(); }), HasSubstr("writes memory that aten::sum"));
  order(side, main);
  t.zero_();
  EXPECT_EQ(sum.item<float>(), 8);
}

TEST_F(FakeDevice, OtherPartOfTheMemory_NeedsNoWait) {
  const Stream side = gpu_.create_stream(false), main = gpu_.current_stream();
  const at::Tensor t = at::zeros({6, 8}, on_device_);
  order(main, side);
  {
    const StreamGuard guard(gpu_, side);
    t.narrow(1, 0, 4).fill_(1);
  }
  t.narrow(1, 4, 4).fill_(2);
  EXPECT_THROW(t.narrow(1, 3, 2).fill_(3), MissingWait);
  order(side, main);
  EXPECT_EQ(t.sum().item<float>(), 6 * 12);
}

TEST_F(FakeDevice, NewMemory_BelongsToTheStreamThatAllocated) {
  const Stream side = gpu_.create_stream(false);
  const at::Tensor before = at::ones({8}, on_device_), t = at::empty({8}, on_device_);
  const StreamGuard guard(gpu_, side);
  EXPECT_THAT(message_of([&] { t.fill_(1); }), HasSubstr("allocation"));
}

TEST_F(FakeDevice, FreedWhileAnotherStreamReads_NeedsKeepFor) {
  const Stream side = gpu_.create_stream(false), main = gpu_.current_stream();
  const auto read_on_side = [&](const at::Tensor& t) {
    order(main, side);
    const StreamGuard guard(gpu_, side);
    return t.sum();
  };
  const at::Tensor a = read_on_side(at::ones({5000}, on_device_));
  EXPECT_THAT(message_of([&] { (void)at::empty({5000}, on_device_); }), HasSubstr("reuses freed"));
  order(side, main);
  EXPECT_EQ(at::ones({5000}, on_device_).sum().item<float>(), 5000);

  at::Tensor kept = at::ones({7000}, on_device_);
  const void* const place = kept.data_ptr();
  const at::Tensor b = read_on_side(kept);
  gpu_.keep_for(kept, side);
  kept.reset();
  EXPECT_NE(at::empty({7000}, on_device_).data_ptr(), place);
  gpu_.synchronize(side);
  EXPECT_EQ(a.item<float>() + b.item<float>(), 12000);
}

TEST_F(FakeDevice, Events_AreDoneAtTheSecondPollOrWhenTheHostWaited) {
  const Event event = gpu_.create_event();
  EXPECT_TRUE(gpu_.is_done(event));
  const at::Tensor t = at::ones({8}, on_device_);
  gpu_.record(event, gpu_.current_stream());
  EXPECT_FALSE(gpu_.is_done(event));
  EXPECT_TRUE(gpu_.is_done(event));
  t.fill_(2);
  gpu_.record(event, gpu_.current_stream());
  gpu_.synchronize(event);
  EXPECT_TRUE(gpu_.is_done(event));
  gpu_.destroy(event);
}

TEST_F(FakeDevice, CopyToPinned_ArrivesWhenTheHostWaits) {
  const at::Tensor t = at::arange(8, on_device_.dtype(at::kFloat));
  const at::Tensor pinned = gpu_.empty_pinned({8}, at::kFloat);
  EXPECT_TRUE(pinned.is_pinned());
  EXPECT_TRUE(pinned.narrow(0, 2, 3).is_pinned());
  EXPECT_FALSE(at::empty({8}).is_pinned());
  const int64_t before = host_syncs();
  pinned.copy_(t, /*non_blocking=*/true);
  t.zero_();
  EXPECT_EQ(host_syncs(), before);
  EXPECT_TRUE(pinned.isnan().all().item<bool>());
  const at::Tensor back = at::empty({8}, on_device_);
  back.copy_(pinned, true);  // on the same stream: reads what arrived
  gpu_.synchronize(gpu_.current_stream());
  EXPECT_EQ(host_syncs(), before + 1);
  EXPECT_EQ(pinned.sum().item<float>(), 28);
  EXPECT_EQ(back.sum().item<float>(), 28);
  const at::Tensor host = t.to(at::kCPU, /*non_blocking=*/true);
  EXPECT_TRUE(host.isnan().all().item<bool>());
  gpu_.synchronize(gpu_.current_stream());
  EXPECT_EQ(host.sum().item<float>(), 0);
}

TEST_F(FakeDevice, ChangedPinnedSource_IsAMissingWait) {
  const at::Tensor pinned = gpu_.empty_pinned({8}, at::kFloat), t = at::empty({8}, on_device_);
  pinned.fill_(1);
  t.copy_(pinned, true);
  gpu_.synchronize(gpu_.current_stream());
  pinned.fill_(2);
  t.copy_(pinned, true);
  pinned.fill_(3);
  EXPECT_THAT(message_of([&] { gpu_.synchronize(gpu_.current_stream()); }),
              HasSubstr("pinned source"));
  gpu_.synchronize(gpu_.current_stream());
}

TEST_F(FakeDevice, PinnedMemoryBetweenStreams_NeedsOrder) {
  const device::Stream here = gpu_.current_stream(), other = gpu_.create_stream(false);
  const at::Tensor pinned = gpu_.empty_pinned({16}, at::kFloat);
  const at::Tensor first = pinned.narrow(0, 0, 8), second = pinned.narrow(0, 8, 8);
  const at::Tensor from = at::ones({8}, on_device_), to = at::empty({8}, on_device_);
  const device::Event event = gpu_.create_event();
  const auto order = [&](device::Stream earlier, device::Stream later) {
    gpu_.record(event, earlier);
    gpu_.wait(later, event);
  };
  order(here, other);
  first.copy_(from, true);
  {
    const device::StreamGuard there(gpu_, other);
    EXPECT_THAT(message_of([&] { to.copy_(first, true); }), HasSubstr("reads what arrives"));
    EXPECT_THAT(message_of([&] { first.copy_(from, true); }), HasSubstr("writes to pinned"));
    second.copy_(from, true);
    order(here, other);
    to.copy_(first, true);
  }
  EXPECT_THAT(message_of([&] { first.copy_(from, true); }), HasSubstr("writes to pinned"));
  order(other, here);
  first.copy_(from, true);  // behind the copy that read it
  EXPECT_EQ(to.sum().item<float>(), 8);
  EXPECT_EQ(pinned.sum().item<float>(), 16);
  gpu_.destroy(event);
}

TEST_F(FakeDevice, HostWaits_AreCounted) {
  const at::Tensor t = at::arange(8, on_device_.dtype(at::kFloat));
  const auto waits = [](auto&& fn) {
    const int64_t before = host_syncs_of_thread(), all = host_syncs();
    fn();
    EXPECT_EQ(host_syncs() - all, host_syncs_of_thread() - before);
    return host_syncs_of_thread() - before;
  };
  EXPECT_EQ(waits([&] { (void)at::softmax(t.mul(2).add_(1), 0).sum(); }), 0);
  EXPECT_EQ(waits([&] { (void)t[3].item<float>(); }), 1);
  EXPECT_EQ(waits([&] { (void)t.cpu(); }), 1);
  EXPECT_EQ(waits([&] { (void)t.nonzero(); }), 1);
  EXPECT_EQ(last_host_syncs(3), "item, copy to the host, aten::nonzero");
  EXPECT_GE(waits([&] { (void)t.index({t.gt(2)}); }), 1);
  EXPECT_EQ(waits([&] { t.copy_(at::ones({8})); }), 1);
  EXPECT_EQ(waits([&] { t.copy_(gpu_.empty_pinned({8}, at::kFloat), true); }), 0);
  EXPECT_EQ(waits([&] { t.copy_(gpu_.empty_pinned({8}, at::kDouble), true); }), 1);
  EXPECT_EQ(waits([&] { t.copy_(at::ones({8}), true); }), 1);
  EXPECT_EQ(waits([&] { gpu_.empty_pinned({8}, at::kFloat).copy_(t, true); }), 0);
  EXPECT_EQ(waits([&] { gpu_.empty_pinned({8}, at::kHalf).copy_(t, true); }), 1);
  EXPECT_EQ(waits([&] { (void)at::arange(8, on_device_).add(at::scalar_tensor(1)); }), 0);
}

TEST_F(FakeDevice, ManyThreads_ShareTheDevice) {
  std::vector<std::thread> threads;
  std::atomic<int> wrong = 0;
  for (int id = 0; id < 4; ++id)
    threads.emplace_back([&, id] {
      const StreamGuard guard(gpu_, gpu_.create_stream(false));
      at::Tensor t = at::full({100}, id, on_device_.dtype(at::kFloat));
      for (int i = 0; i < 200; ++i) t = t.add(1).sub(1);
      if (t.sum().item<float>() != static_cast<float>(id) * 100) ++wrong;
    });
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace capstan::test
