// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Mesh: the axes of a grid as communicators of one rank.
#pragma once
#include <map>
#include <string>

#include "capstan/comm/communicator.h"
#include "capstan/plan/grid.h"

namespace capstan::mesh {

// Owned by one rank; not for use by several threads. Copies share the groups that existed when they
// were made.
class Mesh {
 public:
  Mesh() = default;  // one rank
  // Makes the communicators of every axis longer than one, and of the usual sets of data axes
  // (dp_shard+cp, dp_replicate+dp_shard, dp_replicate+dp_shard+cp, dp_replicate+edp_shard).
  // world.size() must equal grid.size(). Collective over: world.
  Mesh(comm::Communicator world, const plan::Grid& grid);

  [[nodiscard]] const plan::Grid& grid() const { return grid_; }
  [[nodiscard]] const comm::Communicator& world() const { return world_; }
  [[nodiscard]] int rank() const { return world_.rank(); }
  [[nodiscard]] const plan::Coord& coord() const { return coord_; }
  // Position of this rank along the axes, and their length.
  [[nodiscard]] int index(plan::AxisSet axes) const { return grid_.index_along(axes, rank()); }
  [[nodiscard]] int size(plan::AxisSet axes) const { return grid_.size_of(axes); }

  // The ranks that differ from this one in these axes only; its axis is name_of(axes). Groups with
  // the same ranks share one order of operations. Sets that the constructor did not make are made
  // at the first call, then kept: that first call is collective over: world, in the same order on
  // every rank.
  [[nodiscard]] const comm::Communicator& along(plan::AxisSet axes);
  // The same for sets that exist already; throws InternalError otherwise.
  [[nodiscard]] const comm::Communicator& along(plan::AxisSet axes) const;

 private:
  plan::Grid grid_;
  comm::Communicator world_;
  plan::Coord coord_;
  std::map<unsigned, comm::Communicator>
      groups_;                                    // by AxisSet::bits(), axes of length one left out
  std::map<unsigned, comm::Communicator> named_;  // by AxisSet::bits() as asked for
};

}  // namespace capstan::mesh
