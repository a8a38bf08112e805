// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/comm/world.h"

#include "capstan/comm/nccl.h"
#include "comm/gloo_job_internal.h"
#include "comm/single_backend_internal.h"

namespace capstan::comm {

struct World::State {
  std::shared_ptr<GlooJob> job;
  bool is_closed = false;
};

World::World(const RankEnv& env, double timeout_s)
    : env_(env),
      communicator_(std::make_shared<SingleBackend>(
                        Group{}, std::make_shared<RankState>(env.rank, timeout_s)),
                    "world") {
  if (env_.size == 1) return;
  auto state = std::make_shared<RankState>(env_.rank, timeout_s);
  GlooJob::Stores stores;
  stores.main = KeyStore::of_job(env_, timeout_s);
  stores.watcher = KeyStore::client_of(env_, timeout_s);
  meet_all_ranks(*stores.main, env_.rank, env_.size, timeout_s);
  auto device = open_network_device(env_.local_size == env_.size);
  state_ = std::make_unique<State>();
  state_->job =
      std::make_shared<GlooJob>(std::move(stores), std::move(device), std::move(state), env_.size);
  communicator_ = make_gloo_world(state_->job, env_.size);
}

World::World(World&&) noexcept = default;
World& World::operator=(World&&) noexcept = default;

World::~World() {
  if (!state_ || state_->is_closed) return;
  state_->job->abort("the rank left the job before its end");
  state_->job->stop_watching();
}

void World::use_nccl(std::shared_ptr<NcclApi> api, device::Accelerator& accelerator) {
  if (state_) communicator_ = make_nccl_communicator(communicator_, std::move(api), accelerator);
}

void World::close() {
  if (!state_ || std::exchange(state_->is_closed, true)) return;
  try {
    communicator_.control().barrier().wait();
    state_->job->stop_watching();
    communicator_.control().barrier().wait();  // nobody asks the store of rank 0 any more
  } catch (...) {
    state_->is_closed = false;
    throw;
  }
}

}  // namespace capstan::comm
