// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// World: all ranks of a job of processes, as the environment describes it. RANK, WORLD_SIZE,
// LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT as torchrun sets them; CAPSTAN_STORE_FD
// names a listening socket that rank 0 inherited for MASTER_PORT. Without RANK and WORLD_SIZE the
// job is this one process.
#pragma once
#include <memory>
#include <optional>
#include <string>

#include "capstan/comm/communicator.h"
#include "capstan/device/accelerator.h"

namespace capstan::comm {

class NcclApi;

struct RankEnv {
  int rank = 0, size = 1;
  int local_rank = 0, local_size = 1;  // on this machine
  std::string master_addr = "127.0.0.1";
  int master_port = 0;
  std::optional<int> store_descriptor;  // rank 0 only
};
// Throws EnvError naming the variable that is missing, malformed or out of range.
[[nodiscard]] RankEnv read_rank_env();

// Owns the store, the network device and the watcher thread of this process. Move-only;
// communicators that outlive it keep what they need. A process with peers ignores SIGPIPE from here
// on, unless it has a handler. A rank that fails calls communicator().abort(why) while its World
// lives, so that the others can name the cause. Collective over: world (constructor and close).
class World {
 public:
  // Meets the other ranks; missing ones are named when `timeout_s` has passed.
  explicit World(const RankEnv& env, double timeout_s = 600);
  [[nodiscard]] static World from_env(double timeout_s = 600) {
    return World(read_rank_env(), timeout_s);
  }
  World(World&&) noexcept;
  World& operator=(World&&) noexcept;
  ~World();  // leaves at once: peers that still wait for this rank see it as failed; see close()

  [[nodiscard]] const RankEnv& env() const { return env_; }
  [[nodiscard]] int rank() const { return env_.rank; }
  [[nodiscard]] int size() const { return env_.size; }
  [[nodiscard]] const Communicator& communicator() const { return communicator_; }  // axis "world"

  // From here on communicator() takes tensors of the accelerator as well (nccl.h); call it before
  // the first split. Collective over: world.
  void use_nccl(std::shared_ptr<NcclApi> api, device::Accelerator& accelerator);

  // The orderly end: waits until every rank is here. Call it once, after the last collective.
  void close();

 private:
  struct State;
  RankEnv env_;
  std::unique_ptr<State> state_;
  Communicator communicator_;
};

// Rank `rank` of `size` without peers: collectives only count and record, outputs keep their
// content (all_reduce and friends of one rank's own data). For traffic predictions and dry runs.
[[nodiscard]] Communicator make_fake_communicator(int rank, int size);

}  // namespace capstan::comm
