// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "comm/gloo_transport_internal.h"

#include <signal.h>

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include <cstdlib>
#include <mutex>
#include <numeric>

#include "capstan/base/log.h"
#include "comm/store_internal.h"

namespace capstan::comm {
namespace {

// Gives access to the connections, to end operations from outside.
class ClosableGroup final : public c10d::ProcessGroupGloo {
 public:
  using c10d::ProcessGroupGloo::ProcessGroupGloo;
  void close_connections() {
    for (const auto& context : contexts_) context->closeConnections();
  }
};

using GroupPointer = c10::intrusive_ptr<ClosableGroup>;

GroupPointer make_group(KeyStore& store, const NetworkDevice& device,
                        const GlooTransport::Place& place, Milliseconds timeout) {
  auto options = c10d::ProcessGroupGloo::Options::create(timeout);
  options->devices.push_back(device);
  options->threads = 1;  // one collective at a time is issued
  options->global_ranks_in_group.resize(static_cast<size_t>(place.size));
  std::iota(options->global_ranks_in_group.begin(), options->global_ranks_in_group.end(), 0);
  auto whole = c10::intrusive_ptr<c10d::Store>::reclaim_copy(&store.c10d_store());
  auto part = c10::make_intrusive<c10d::PrefixStore>("gloo/" + place.group, std::move(whole));
  return c10::make_intrusive<ClosableGroup>(std::move(part), place.rank, place.size,
                                            std::move(options));
}

}  // namespace

struct GlooTransport::State {
  GroupPointer group;

  // One lock for all groups of the process: issuing writes to a record of c10d's own that all
  // groups share and that has no lock. It only queues the operation, so nobody waits long.
  static std::mutex& issue_mutex() {
    static std::mutex mutex;
    return mutex;
  }
  template <class Issue>
  c10::intrusive_ptr<c10d::Work> issue(Issue&& call) {
    std::lock_guard lock(issue_mutex());
    return call();
  }
};

namespace {

// Gloo writes to sockets whose peer may be gone; the failed write is reported, the signal would end
// the process without a word. A handler of the program stays.
void ignore_broken_pipes() {
  struct sigaction current {};
  if (::sigaction(SIGPIPE, nullptr, &current) == 0 && (current.sa_flags & SA_SIGINFO) == 0 &&
      current.sa_handler == SIG_DFL)
    ::signal(SIGPIPE, SIG_IGN);
}

}  // namespace

NetworkDevice open_network_device(bool one_machine) {
  ignore_broken_pipes();
  if (const char* interface = std::getenv("GLOO_SOCKET_IFNAME");
      interface != nullptr && *interface != '\0')
    return c10d::ProcessGroupGloo::createDeviceForInterface(interface);
  if (one_machine) return c10d::ProcessGroupGloo::createDeviceForHostname("127.0.0.1");
  return c10d::ProcessGroupGloo::createDefaultDevice();
}

GlooTransport::GlooTransport(KeyStore& store, const NetworkDevice& device, const Place& place,
                             Milliseconds timeout)
    : state_(std::make_shared<State>()) {
  state_->group = make_group(store, device, place, timeout);
}

GlooTransport::~GlooTransport() = default;

void GlooTransport::all_to_all(at::Tensor out, at::Tensor in, std::vector<int64_t> out_bytes,
                               std::vector<int64_t> in_bytes, Milliseconds timeout) {
  c10d::AllToAllOptions options;
  options.timeout = timeout;
  state_->issue([&] { return state_->group->alltoall_base(out, in, out_bytes, in_bytes, options); })
      ->wait();
}

void GlooTransport::all_gather(at::Tensor out, at::Tensor in, Milliseconds timeout) {
  c10d::AllgatherOptions options;
  options.timeout = timeout;
  state_->issue([&] { return state_->group->_allgather_base(out, in, options); })->wait();
}

void GlooTransport::broadcast(at::Tensor inout, int root, Milliseconds timeout) {
  c10d::BroadcastOptions options;
  options.rootRank = root;
  options.timeout = timeout;
  std::vector<at::Tensor> tensors{std::move(inout)};
  state_->issue([&] { return state_->group->broadcast(tensors, options); })->wait();
}

void GlooTransport::barrier(Milliseconds timeout) {
  c10d::BarrierOptions options;
  options.timeout = timeout;
  state_->issue([&] { return state_->group->barrier(options); })->wait();
}

GlooTransport::Pending GlooTransport::send(at::Tensor in, int to, int tag) {
  std::vector<at::Tensor> tensors{std::move(in)};
  auto work = state_->issue([&] { return state_->group->send(tensors, to, tag); });
  return [state = state_, work](Milliseconds timeout) { work->wait(timeout); };
}

GlooTransport::Pending GlooTransport::recv(at::Tensor out, int from, int tag) {
  std::vector<at::Tensor> tensors{std::move(out)};
  auto work = state_->issue([&] { return state_->group->recv(tensors, from, tag); });
  return [state = state_, work](Milliseconds timeout) { work->wait(timeout); };
}

void GlooTransport::close_connections() noexcept {
  try {
    state_->group->close_connections();
  } catch (const std::exception& e) {
    log::debug("comm", "closing connections: {}", e.what());
  }
}

}  // namespace capstan::comm
