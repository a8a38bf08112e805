// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A group of one rank (Communicator never issues to it), and groups without peers for dry runs.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "capstan/comm/backend.h"
#include "capstan/device/accelerator.h"

namespace capstan::comm {

class SingleBackend final : public Backend {
 public:
  // Alone in the job.
  SingleBackend(Group group, std::shared_ptr<RankState> state)
      : Backend(std::move(group), std::move(state)) {}
  // A subgroup of one: an abort goes to the job of `parent`.
  SingleBackend(Group group, std::shared_ptr<Backend> parent)
      : Backend(std::move(group), parent->shared_state()), parent_(std::move(parent)) {}

  [[nodiscard]] const char* name() const override { return "single"; }
  [[nodiscard]] std::shared_ptr<WorkState> issue(Request request) override;
  [[nodiscard]] std::shared_ptr<Backend> split(const std::string& axis,
                                               const std::vector<int>& members) override;
  void abort(const std::string& reason) noexcept override;
  [[nodiscard]] c10::Device device() const override { return device::run_device(); }
  [[nodiscard]] bool is_aborted() const override {
    return parent_ ? parent_->is_aborted() : aborted_.load();
  }

 private:
  std::shared_ptr<Backend> parent_;
  std::atomic<bool> aborted_ = false;
};

class FakeBackend final : public Backend {
 public:
  FakeBackend(Group group, std::shared_ptr<RankState> state)
      : Backend(std::move(group), std::move(state)) {}

  [[nodiscard]] const char* name() const override { return "fake"; }
  [[nodiscard]] std::shared_ptr<WorkState> issue(Request request) override;
  [[nodiscard]] std::shared_ptr<Backend> split(const std::string& axis,
                                               const std::vector<int>& members) override;
  void abort(const std::string& reason) noexcept override;
  [[nodiscard]] c10::Device device() const override { return device::run_device(); }
  [[nodiscard]] bool is_aborted() const override { return aborted_; }

 private:
  int64_t issued_ = 0;
  std::atomic<bool> aborted_ = false;
};

}  // namespace capstan::comm
