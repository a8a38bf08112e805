// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "comm/nccl_backend_internal.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <chrono>
#include <cstring>
#include <exception>
#include <thread>

#include "capstan/base/check.h"
#include "capstan/comm/nccl.h"

namespace capstan::comm {
namespace {

constexpr const char* kControlAxis = "control";

Tensor as_tensor(const NcclUniqueId& id) {
  const Tensor bytes = at::empty({static_cast<int64_t>(id.bytes.size())}, at::kByte);
  std::memcpy(bytes.data_ptr(), id.bytes.data(), id.bytes.size());
  return bytes;
}

NcclUniqueId as_id(const Tensor& bytes) {
  NcclUniqueId id;
  std::memcpy(id.bytes.data(), bytes.const_data_ptr(), id.bytes.size());
  return id;
}

NcclUniqueId make_unique_id(NcclApi& api, const Group& group) {
  NcclUniqueId id;
  const NcclResult result = api.get_unique_id(id);
  if (result == NcclResult::kSuccess) return id;
  throw EnvError(ErrorText{.module = "comm",
                           .what = "preparing NCCL for the ranks " + group.text(),
                           .got = nccl_error_text(api, {}, "ncclGetUniqueId", result),
                           .need = "a network interface that NCCL can use",
                           .fix = "Name one in NCCL_SOCKET_IFNAME"});
}

void refuse_if_impossible(const Request& request) {
  if (request.op != Op::kAllReduce && request.op != Op::kReduceScatter) return;
  if (nccl_reduction_of(request.in.scalar_type(), request.reduce)) return;
  throw InternalError(
      ErrorText{.module = "comm",
                .what = fmt::format("calling {} on axis {}", describe(request), request.axis),
                .got = "a reduction that NCCL does not have",
                .need = "sum, max or min of fp64, fp32, bf16, fp16, int64, int32, int8 or uint8, "
                        "or the logical or of bool",
                .fix = "Reduce a tensor on the CPU"});
}

}  // namespace

NcclUniqueId share_unique_id(NcclApi& api, Backend& control) {
  constexpr int kRoot = 0;
  Tensor bytes = as_tensor({});
  if (control.group().rank == kRoot) bytes = as_tensor(make_unique_id(api, control.group()));
  const auto work = control.issue(
      {.op = Op::kBroadcast, .out = bytes, .in = bytes, .peer = kRoot, .axis = kControlAxis});
  if (work) work->wait();
  return as_id(bytes);
}

NcclBackend::NcclBackend(std::shared_ptr<NcclJob> job, std::shared_ptr<Backend> control,
                         std::string id, const NcclUniqueId& unique_id)
    : Backend(control->group(), control->shared_state()),
      job_(std::move(job)),
      control_(std::move(control)),
      id_(std::move(id)) {
  collectives_ = job_->open_channel(
      {.rank = group().rank, .size = group().size(), .name = id_},
      [unique_id](const std::atomic<bool>&) { return std::optional(unique_id); });
}

NcclBackend::~NcclBackend() {
  const bool is_failing = std::uncaught_exceptions() > 0 || is_aborted();
  try {
    collectives_->release(is_failing);
    for (const auto& [direction, channel] : messages_) channel->release(is_failing);
  } catch (const std::exception& e) {
    log_check_failure("release", __FILE__, __LINE__, e.what());
  }
}

NcclBackend::Direction NcclBackend::direction_of(const Request& request) const {
  return request.op == Op::kSend ? Direction{group().rank, request.peer}
                                 : Direction{request.peer, group().rank};
}

NcclWork::Place NcclBackend::collective_place(const Request& request) {
  const int64_t sequence = next_collective_++;
  NcclWork::Place place{.note = {.title = fmt::format("{} #{} on {}{}", describe(request), sequence,
                                                      request.axis, group().text()),
                                 .sequence = sequence,
                                 .counters = {}},
                        .counter = id_};
  for (const int rank : group().ranks) place.note.counters[rank] = id_;
  return place;
}

NcclWork::Place NcclBackend::message_place(const Request& request) {
  const auto [from, to] = direction_of(request);
  const bool sends = request.op == Op::kSend;
  const int64_t sequence = next_message_[{from, to}]++;
  const int peer = group().ranks[static_cast<size_t>(request.peer)];
  const auto counter = [&, from = from, to = to](bool sender) {
    return fmt::format("{}:{}>{}:{}", id_, from, to, sender ? "send" : "recv");
  };
  return {.note = {.title = fmt::format("{} {} rank {} #{} on {}{}", describe(request),
                                        sends ? "to" : "from", peer, sequence, request.axis,
                                        group().text()),
                   .sequence = sequence,
                   .counters = {{peer, counter(!sends)}}},
          .counter = counter(sends)};
}

NcclWork::Place NcclBackend::place_of(const Request& request) {
  auto place = request.is_point_to_point() ? message_place(request) : collective_place(request);
  if (is_aborted()) job_->device()->rethrow_end(place.note.title);
  place.flight = state().recorder.add({.axis = request.axis + group().text(),
                                       .sequence = place.note.sequence,
                                       .what = describe(request)});
  return place;
}

// Like a collective of its own kind; all members launch the same graphs in the same order.
NcclWork::Place NcclBackend::launch_place(const std::string& what) {
  const int64_t sequence = next_launch_++;
  const std::string counter = id_ + ":graphs";
  NcclWork::Place place{.note = {.title = fmt::format("a launched graph #{} of {} on {}", sequence,
                                                      what, group().text()),
                                 .sequence = sequence,
                                 .counters = {}},
                        .counter = counter};
  for (const int rank : group().ranks) place.note.counters[rank] = counter;
  check_job();
  place.flight = state().recorder.add(
      {.axis = group().text(), .sequence = sequence, .what = "a launched graph of " + what});
  return place;
}

void NcclBackend::launch(const std::string& what, const std::function<void()>& launch) {
  const auto work = std::make_shared<NcclWork>(job_->device(), Request{}, launch_place(what));
  job_->launches().watch(work);
  launch();
  work->set_launched(accelerator().current_stream());
}

void NcclBackend::check_job() {
  if (is_aborted()) job_->device()->rethrow_end("the end of a step on the device");
}

std::shared_ptr<WorkState> NcclBackend::issue(Request request) {
  const Tensor& payload = request.payload();
  const bool is_recorded = accelerator().is_capturing();
  if (!payload.defined() || payload.is_cpu()) {
    CAPSTAN_CHECK(!is_recorded, "{} on {} waits for the host while a graph is recorded",
                  describe(request), request.axis);
    return control_->issue(std::move(request));
  }
  refuse_if_impossible(request);
  if (is_recorded) return channel_of(request).record(std::move(request));
  auto place = place_of(request);
  NcclChannel& channel = channel_of(request);
  const auto work =
      std::make_shared<NcclWork>(job_->device(), std::move(request), std::move(place));
  channel.submit(work);
  return work;
}

NcclChannel& NcclBackend::channel_of(const Request& request) {
  if (!request.is_point_to_point()) return *collectives_;
  const Direction direction = direction_of(request);
  std::shared_ptr<NcclChannel>& channel = messages_[direction];
  if (!channel)
    channel = job_->open_channel(
        {.rank = request.op == Op::kSend ? 0 : 1,
         .size = 2,
         .name = fmt::format("{}:{}>{}", id_, direction.first, direction.second)},
        message_id(direction));
  return *channel;
}

// Travels as a message of the control group, before the first one on the device.
NcclChannel::IdSource NcclBackend::message_id(Direction direction) {
  const bool sends = direction.first == group().rank;
  const NcclUniqueId mine = sends ? make_unique_id(*job_->device()->api, group()) : NcclUniqueId{};
  const Tensor bytes = as_tensor(mine);
  Request message{.op = sends ? Op::kSend : Op::kRecv,
                  .peer = sends ? direction.second : direction.first,
                  .axis = kControlAxis};
  (sends ? message.in : message.out) = bytes;
  const auto work = control_->issue(std::move(message));
  if (sends) return [mine, work](const std::atomic<bool>&) { return std::optional(mine); };
  return [bytes, work](const std::atomic<bool>& stop) -> std::optional<NcclUniqueId> {
    for (; !work->is_done(); std::this_thread::sleep_for(std::chrono::milliseconds(1)))
      if (stop) return std::nullopt;
    work->wait();
    return as_id(bytes);
  };
}

std::shared_ptr<Backend> NcclBackend::split(const std::string& axis,
                                            const std::vector<int>& members) {
  const int64_t index = next_split_++;
  auto control = control_->split(axis, members);
  if (members.size() == 1) return nullptr;
  const NcclUniqueId unique_id = share_unique_id(*job_->device()->api, *control);
  return std::make_shared<NcclBackend>(
      job_, std::move(control), fmt::format("{}/{}.{}.{}", id_, axis, index, members.front()),
      unique_id);
}

void NcclBackend::abort(const std::string& reason) noexcept {
  control_->abort(reason);
  if (!job_->device()->is_explaining()) job_->close_channels();  // else the watcher does
}

Communicator make_nccl_communicator(const Communicator& control, std::shared_ptr<NcclApi> api,
                                    device::Accelerator& accelerator) {
  const auto& below = control.backend();
  const auto book = below->wait_book();
  CAPSTAN_CHECK(control.size() > 1 && book != nullptr,
                "NCCL needs ranks to talk to and a backend below that knows them; got {} of {}",
                control.size(), control.backend_name());
  const NcclUniqueId unique_id = share_unique_id(*api, *below);
  const auto job = std::make_shared<NcclJob>(
      std::make_shared<NcclDevice>(std::move(api), accelerator, book, below->shared_state()));
  return {std::make_shared<NcclBackend>(job, below, "nccl", unique_id), control.axis()};
}

}  // namespace capstan::comm
