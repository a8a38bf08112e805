// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/mesh/mesh.h"

#include <fmt/format.h>

#include "capstan/base/error.h"

namespace capstan::mesh {

using plan::AxisSet;

Mesh::Mesh(comm::Communicator world, const plan::Grid& grid)
    : grid_(grid), world_(std::move(world)), coord_(grid.coord(world_.rank())) {
  if (world_.size() != grid_.size())
    throw InternalError(
        ErrorText{.module = "mesh",
                  .what = "laying the grid over the ranks",
                  .got = fmt::format("{} ranks", world_.size()),
                  .need = fmt::format("{}, the product of the axes", grid_.size())});
  for (const AxisSet axes : plan::group_axes()) (void)along(axes);
}

const comm::Communicator& Mesh::along(AxisSet axes) {
  if (const auto found = named_.find(axes.bits()); found != named_.end()) return found->second;
  const AxisSet kept = plan::without_trivial(grid_, axes);
  auto group = groups_.find(kept.bits());
  if (group == groups_.end()) {
    const std::string name = plan::name_of(kept.empty() ? axes : kept);
    group = groups_.emplace(kept.bits(), world_.split(name, grid_.ranks_along(kept, rank()))).first;
  }
  return named_.emplace(axes.bits(), group->second.renamed(plan::name_of(axes))).first->second;
}

const comm::Communicator& Mesh::along(AxisSet axes) const {
  if (const auto found = named_.find(axes.bits()); found != named_.end()) return found->second;
  throw InternalError(ErrorText{.module = "mesh",
                                .what = "looking up the group along " + plan::name_of(axes),
                                .got = "axes without a communicator",
                                .need = "axes that the constructor or along() has made"});
}

}  // namespace capstan::mesh
