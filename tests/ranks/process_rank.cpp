// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "ranks/process_rank.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "capstan/comm/backend.h"
#include "capstan/device/accelerator.h"
#include "support/gpu_ranks.h"

namespace capstan::test {
namespace {

using at::Tensor;

constexpr double kMeetingSeconds = 120;

Tensor whole_storage(const Tensor& x) {
  const auto bytes = static_cast<int64_t>(x.storage().nbytes());
  return x.detach().as_strided({bytes / x.element_size()}, {1}, 0);
}

// Copies on the device that overlap as the tensors do.
void move_to_device(comm::Request& request) {
  Tensor from, copy;
  for (Tensor* x : {&request.out, &request.in}) {
    if (!x->defined()) continue;
    if (!from.defined() || !x->is_alias_of(from)) {
      from = *x;
      copy = whole_storage(*x).to(device::run_device(), x->scalar_type(), false, /*copy=*/true);
    }
    *x = copy.as_strided(x->sizes(), x->strides(), x->storage_offset());
  }
}

class CopyingWork final : public comm::WorkState {
 public:
  CopyingWork(std::shared_ptr<comm::WorkState> inner, Tensor out, Tensor on_device)
      : inner_(std::move(inner)), out_(std::move(out)), on_device_(std::move(on_device)) {}
  void wait() override {
    inner_->wait();
    if (device::Accelerator* const device = device::accelerator()) {
      device->synchronize(device->current_stream());
      inner_->wait();  // throws what ended the operation meanwhile
    }
    if (out_.defined()) out_.detach().copy_(on_device_);
    out_.reset();
  }
  [[nodiscard]] bool is_done() const override { return inner_->is_done(); }

 private:
  std::shared_ptr<comm::WorkState> inner_;
  Tensor out_, on_device_;
};

class CopyingBackend final : public comm::Backend {
 public:
  explicit CopyingBackend(std::shared_ptr<comm::Backend> inner)
      : Backend(inner->group(), inner->shared_state()), inner_(std::move(inner)) {}
  [[nodiscard]] const char* name() const override { return inner_->name(); }
  [[nodiscard]] std::shared_ptr<comm::WorkState> issue(comm::Request request) override {
    if (request.axis == "control" || request.op == comm::Op::kBarrier)
      return inner_->issue(std::move(request));
    const Tensor out = request.out;
    move_to_device(request);
    const Tensor on_device = request.out;
    return std::make_shared<CopyingWork>(inner_->issue(std::move(request)), out, on_device);
  }
  [[nodiscard]] std::shared_ptr<comm::Backend> split(const std::string& axis,
                                                     const std::vector<int>& members) override {
    auto part = inner_->split(axis, members);
    return part ? std::make_shared<CopyingBackend>(std::move(part)) : nullptr;
  }
  void abort(const std::string& reason) noexcept override { inner_->abort(reason); }
  [[nodiscard]] bool is_aborted() const override { return inner_->is_aborted(); }

 private:
  std::shared_ptr<comm::Backend> inner_;
};

std::optional<comm::World>& met_world() {
  static std::optional<comm::World> world;
  return world;
}

class Leaving : public ::testing::Environment {
  void TearDown() override {
    std::optional<comm::World>& world = met_world();
    if (world && !world->communicator().is_aborted()) world->close();
    world.reset();
  }
};
const auto* const leaving = ::testing::AddGlobalTestEnvironment(new Leaving);

}  // namespace

comm::Communicator process_world() {
  std::optional<comm::World>& world = met_world();
  if (!world) world.emplace(meet_ranks(kMeetingSeconds));
  const comm::Communicator& mine = world->communicator();
  return {std::make_shared<CopyingBackend>(mine.backend()), mine.axis()};
}

}  // namespace capstan::test
