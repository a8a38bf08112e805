// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The torch side of checkpoints: state entries to bytes, and saving in the background.
#pragma once
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "capstan/checkpoint/commit.h"
#include "capstan/checkpoint/load.h"
#include "capstan/comm/communicator.h"
#include "capstan/mesh/state_entry.h"

namespace capstan::checkpoint {

// Blobs over the live storage of the entries, which is on the CPU: valid while their tensors are.
[[nodiscard]] std::vector<StateBlob> blobs_of(const std::vector<mesh::StateEntry>& entries);

// The same for entries on any device: what is not on the CPU has a copy here.
class HostState {
 public:
  explicit HostState(std::vector<mesh::StateEntry> entries);
  [[nodiscard]] std::vector<StateBlob> blobs() const { return blobs_of(on_host_); }
  // After the blobs were written to: copies them to where the entries live.
  void write_back() const;

 private:
  std::vector<mesh::StateEntry> entries_, on_host_;
};

// A commit group over a communicator of its own (saving in the background must not share one with
// the step).
class CommunicatorGroup final : public CommitGroup {
 public:
  explicit CommunicatorGroup(comm::Communicator communicator);
  int rank() const override;
  int size() const override;
  std::vector<std::string> gather(const std::string& mine) override;

 private:
  comm::Communicator communicator_;
};

struct SaveOutcome {
  int64_t step = 0;
  Path path;
  int64_t bytes = 0;
  double stall_ms = 0;   // the step loop waited
  double commit_ms = 0;  // from the snapshot to the rename
  std::string error;     // empty = committed
};

// At most one save in flight. A failed save deletes nothing and is reported once; the caller goes
// on. Every rank makes the same calls in the same order.
class Saver {
 public:
  // `asynchronous`: start() copies the state to staging memory and returns; a thread writes and
  // commits.
  Saver(std::unique_ptr<CommitGroup> group, KeepRules rules, bool asynchronous);
  ~Saver();  // waits for the save in flight
  // No save may be in flight: collect it with wait() first. Collective over: world.
  void start(SaveRequest request);
  [[nodiscard]] bool in_flight() const;
  std::optional<SaveOutcome> poll();  // the finished save, once; never blocks
  std::optional<SaveOutcome> wait();  // the save in flight, if there is one

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace capstan::checkpoint
