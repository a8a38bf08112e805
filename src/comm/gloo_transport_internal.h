// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Moves bytes between the processes of one group through LibTorch's gloo. No arithmetic: gloo's own
// reductions round at every hop, ours do not. Hides c10d's headers.
#pragma once
#include <ATen/core/Tensor.h>

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace gloo::transport {
class Device;
}

namespace capstan::comm {

class KeyStore;

using Milliseconds = std::chrono::milliseconds;
using NetworkDevice = std::shared_ptr<::gloo::transport::Device>;

// The network interface of this process: GLOO_SOCKET_IFNAME, else loopback for a job on one
// machine, else the address of the host's name.
[[nodiscard]] NetworkDevice open_network_device(bool one_machine);

// Tensors are flat, of bytes. Blocking calls throw std::exception with gloo's text; after that the
// group is dead. One thread calls the collectives; send and recv may be called by another one.
class GlooTransport {
 public:
  struct Place {
    std::string group;  // unique in the store
    int rank = 0, size = 1;
  };
  // Collective over: the group. Connects every pair.
  GlooTransport(KeyStore& store, const NetworkDevice& device, const Place& place,
                Milliseconds timeout);
  ~GlooTransport();

  // Part r of `in` goes to rank r; sizes in bytes, empty = equal parts.
  void all_to_all(at::Tensor out, at::Tensor in, std::vector<int64_t> out_bytes,
                  std::vector<int64_t> in_bytes, Milliseconds timeout);
  void all_gather(at::Tensor out, at::Tensor in, Milliseconds timeout);
  void broadcast(at::Tensor inout, int root, Milliseconds timeout);
  void barrier(Milliseconds timeout);
  // Issue and return; the result blocks until the message is through.
  using Pending = std::function<void(Milliseconds timeout)>;
  [[nodiscard]] Pending send(at::Tensor in, int to, int tag);
  [[nodiscard]] Pending recv(at::Tensor out, int from, int tag);

  // Ends all operations under way, here and at the peers. Any thread.
  void close_connections() noexcept;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace capstan::comm
