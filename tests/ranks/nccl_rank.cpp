// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "ranks/nccl_rank.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "capstan/base/env.h"
#include "capstan/comm/backend.h"
#include "capstan/comm/nccl.h"

namespace capstan::test {
namespace {

class HostWork final : public comm::WorkState {
 public:
  HostWork(std::shared_ptr<comm::WorkState> inner, std::shared_ptr<FakeAccelerator> device)
      : inner_(std::move(inner)), device_(std::move(device)) {}
  void wait() override {
    inner_->wait();
    device_->synchronize(device_->current_stream());
    inner_->wait();  // throws what ended the operation meanwhile
  }
  [[nodiscard]] bool is_done() const override { return inner_->is_done(); }

 private:
  std::shared_ptr<comm::WorkState> inner_;
  std::shared_ptr<FakeAccelerator> device_;
};

class HostBackend final : public comm::Backend {
 public:
  HostBackend(std::shared_ptr<comm::Backend> inner, std::shared_ptr<FakeAccelerator> device)
      : Backend(inner->group(), inner->shared_state()),
        inner_(std::move(inner)),
        device_(std::move(device)) {}
  [[nodiscard]] const char* name() const override { return inner_->name(); }
  [[nodiscard]] std::shared_ptr<comm::WorkState> issue(comm::Request request) override {
    if (request.axis == "control" || request.op == comm::Op::kBarrier)
      return inner_->issue(std::move(request));
    if (request.in.defined()) request.in = device_->on_device(request.in);
    if (request.out.defined()) request.out = device_->on_device(request.out);
    return std::make_shared<HostWork>(inner_->issue(std::move(request)), device_);
  }
  [[nodiscard]] std::shared_ptr<comm::Backend> split(const std::string& axis,
                                                     const std::vector<int>& members) override {
    auto part = inner_->split(axis, members);
    return part ? std::make_shared<HostBackend>(std::move(part), device_) : nullptr;
  }
  void abort(const std::string& reason) noexcept override { inner_->abort(reason); }
  [[nodiscard]] bool is_aborted() const override { return inner_->is_aborted(); }

 private:
  std::shared_ptr<comm::Backend> inner_;
  std::shared_ptr<FakeAccelerator> device_;
};

NcclRank make_rank(const std::shared_ptr<FakeFabric>& fabric, const comm::Communicator& control) {
  auto device = std::make_shared<FakeAccelerator>();
  FakeNccl::Options options{.queue = [device](device::Stream stream, std::function<void()> job) {
    device->run(stream, std::move(job));
  }};
  auto api = std::make_shared<FakeNccl>(fabric, control.rank(), std::move(options));
  return {device, comm::make_nccl_communicator(control, std::move(api), *device)};
}

}  // namespace

void run_nccl_ranks(int n, const std::function<void(const NcclRank& rank)>& fn,
                    const NcclRankOptions& options) {
  const auto check = [&] {
    options.fabric->shut_down();
    // The threads that make communicators end by themselves.
    const int64_t end = monotonic_ns() + int64_t{60'000'000'000};
    while (options.fabric->open() > 0 && monotonic_ns() < end) std::this_thread::yield();
    EXPECT_THAT(options.fabric->misuses(), ::testing::IsEmpty());
    EXPECT_EQ(options.fabric->open(), 0) << "NCCL communicators that nobody closed";
  };
  try {
    run_on(
        options.control, n,
        [&](const comm::Communicator& control) {
          const NcclRank rank = make_rank(options.fabric, control);
          try {
            fn(rank);
          } catch (const std::exception& e) {
            rank.world.abort(e.what());
            throw;
          }
          rank.world.barrier().wait();
        },
        options.timeout_s);
  } catch (...) {
    check();
    throw;
  }
  check();
}

comm::Communicator for_cpu_tensors(const NcclRank& rank) {
  return {std::make_shared<HostBackend>(rank.world.backend(), rank.device), rank.world.axis()};
}

}  // namespace capstan::test
