// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// One group whose device tensors go to NCCL and whose CPU tensors and barriers go to the backend
// below.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "comm/nccl_job_internal.h"

namespace capstan::comm {

class NcclBackend final : public Backend {
 public:
  // `id` is unique in the job and equal on all members; `unique_id` names the group to NCCL.
  NcclBackend(std::shared_ptr<NcclJob> job, std::shared_ptr<Backend> control, std::string id,
              const NcclUniqueId& unique_id);
  ~NcclBackend() override;

  [[nodiscard]] const char* name() const override { return "nccl"; }
  [[nodiscard]] std::shared_ptr<WorkState> issue(Request request) override;
  [[nodiscard]] std::shared_ptr<Backend> split(const std::string& axis,
                                               const std::vector<int>& members) override;
  void launch(const std::string& what, const std::function<void()>& launch) override;
  void check_job() override;
  void abort(const std::string& reason) noexcept override;
  [[nodiscard]] bool is_aborted() const override { return control_->is_aborted(); }
  [[nodiscard]] c10::Device device() const override { return accelerator().device(); }
  [[nodiscard]] std::shared_ptr<WaitBook> wait_book() const override {
    return job_->device()->book;
  }

 private:
  using Direction = std::pair<int, int>;  // from, to, in group ranks
  [[nodiscard]] device::Accelerator& accelerator() const { return job_->device()->accelerator; }
  [[nodiscard]] Direction direction_of(const Request& request) const;
  [[nodiscard]] NcclWork::Place place_of(const Request& request);
  [[nodiscard]] NcclWork::Place collective_place(const Request& request);
  [[nodiscard]] NcclWork::Place message_place(const Request& request);
  [[nodiscard]] NcclWork::Place launch_place(const std::string& what);
  [[nodiscard]] NcclChannel& channel_of(const Request& request);
  [[nodiscard]] NcclChannel::IdSource message_id(Direction direction);

  const std::shared_ptr<NcclJob> job_;
  const std::shared_ptr<Backend> control_;
  const std::string id_;
  int64_t next_collective_ = 0, next_split_ = 0, next_launch_ = 0;
  std::map<Direction, int64_t> next_message_;
  std::shared_ptr<NcclChannel> collectives_;
  std::map<Direction, std::shared_ptr<NcclChannel>> messages_;
};

// The identifier that the first member makes, on all members of `control`. Collective over:
// control.
[[nodiscard]] NcclUniqueId share_unique_id(NcclApi& api, Backend& control);

}  // namespace capstan::comm
