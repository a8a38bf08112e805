// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/plan/grid.h"

#include <algorithm>
#include <limits>

#include "capstan/base/bytes.h"
#include "capstan/base/check.h"

namespace capstan::plan {

std::string name_of(AxisSet axes) {
  std::string name;
  const auto add = [&](Axis axis, const char* text) {
    if (!axes.has(axis)) return;
    if (!name.empty()) name += '+';
    name += text;
  };
  add(Axis::kPp, "pp");
  add(Axis::kDpReplicate, "dp_replicate");
  add(Axis::kDpShard, "dp_shard");
  add(Axis::kCp, "cp");
  add(Axis::kTp, "tp");
  add(Axis::kEdpShard, "edp_shard");
  add(Axis::kEp, "ep");
  return name.empty() ? "none" : name;
}

Grid::Grid(const Sizes& sizes) : sizes_(sizes) {
  int64_t ranks = 1;
  for (const int size : {sizes.pp, sizes.dp_replicate, sizes.dp_shard, sizes.cp, sizes.tp}) {
    CAPSTAN_CHECK(size >= 1, "an axis of the grid has size {}, need at least 1", size);
    ranks = checked_multiply(ranks, size).value_or(std::numeric_limits<int64_t>::max());
    CAPSTAN_CHECK(ranks <= std::numeric_limits<int>::max(), "the grid has too many ranks");
  }
  const int foldable = sizes.dp_shard * sizes.cp * sizes.tp;
  CAPSTAN_CHECK(sizes.ep >= 1 && foldable % sizes.ep == 0,
                "ep is {}, need a divisor of dp_shard x cp x tp = {}", sizes.ep, foldable);
}

int Grid::size() const {
  return sizes_.pp * sizes_.dp_replicate * sizes_.dp_shard * sizes_.cp * sizes_.tp;
}

int Grid::size_of(AxisSet axes) const {
  int size = 1;
  if (axes.has(Axis::kPp)) size *= sizes_.pp;
  if (axes.has(Axis::kDpReplicate)) size *= sizes_.dp_replicate;
  if (axes.has(Axis::kDpShard)) size *= sizes_.dp_shard;
  if (axes.has(Axis::kCp)) size *= sizes_.cp;
  if (axes.has(Axis::kTp)) size *= sizes_.tp;
  if (axes.has(Axis::kEp)) size *= sizes_.ep;
  if (axes.has(Axis::kEdpShard)) size *= expert_shard_size();
  return size;
}

int Grid::expert_shard_size() const { return sizes_.dp_shard * sizes_.cp * sizes_.tp / sizes_.ep; }

Coord Grid::coord(int rank) const {
  CAPSTAN_CHECK(rank >= 0 && rank < size(), "rank {} is outside a grid of {} ranks", rank, size());
  Coord c;
  c.tp = rank % sizes_.tp;
  rank /= sizes_.tp;
  c.cp = rank % sizes_.cp;
  rank /= sizes_.cp;
  c.dp_shard = rank % sizes_.dp_shard;
  rank /= sizes_.dp_shard;
  c.dp_replicate = rank % sizes_.dp_replicate;
  c.pp = rank / sizes_.dp_replicate;
  return c;
}

int Grid::rank_of(const Coord& c) const {
  const bool inside = c.pp >= 0 && c.pp < sizes_.pp && c.dp_replicate >= 0 &&
                      c.dp_replicate < sizes_.dp_replicate && c.dp_shard >= 0 &&
                      c.dp_shard < sizes_.dp_shard && c.cp >= 0 && c.cp < sizes_.cp && c.tp >= 0 &&
                      c.tp < sizes_.tp;
  CAPSTAN_CHECK(inside,
                "coordinate outside the grid: pp {}, dp_replicate {}, dp_shard {}, cp {}, tp {}",
                c.pp, c.dp_replicate, c.dp_shard, c.cp, c.tp);
  int rank = c.pp;
  rank = rank * sizes_.dp_replicate + c.dp_replicate;
  rank = rank * sizes_.dp_shard + c.dp_shard;
  rank = rank * sizes_.cp + c.cp;
  return rank * sizes_.tp + c.tp;
}

namespace {

constexpr AxisSet kFoldedAxes = AxisSet(Axis::kDpShard) | Axis::kCp | Axis::kTp;
constexpr AxisSet kExpertAxes = AxisSet(Axis::kEdpShard) | Axis::kEp;

void check_one_view(AxisSet axes) {
  const bool dense = axes.without(kFoldedAxes) != axes;
  const bool expert = axes.without(kExpertAxes) != axes;
  CAPSTAN_CHECK(!(dense && expert), "axes {} mix the dense and the expert view", name_of(axes));
}

}  // namespace

// Positions along every axis of the view, slowest first, with the sizes; the others stay fixed.
std::vector<Grid::Place> Grid::places(AxisSet axes, int rank) const {
  check_one_view(axes);
  const Coord c = coord(rank);
  std::vector<Place> places = {{Axis::kPp, c.pp, sizes_.pp},
                               {Axis::kDpReplicate, c.dp_replicate, sizes_.dp_replicate}};
  if (axes.without(kExpertAxes) != axes) {
    const int folded = rank % (sizes_.dp_shard * sizes_.cp * sizes_.tp);
    places.push_back({Axis::kEdpShard, folded / sizes_.ep, expert_shard_size()});
    places.push_back({Axis::kEp, folded % sizes_.ep, sizes_.ep});
    return places;
  }
  places.push_back({Axis::kDpShard, c.dp_shard, sizes_.dp_shard});
  places.push_back({Axis::kCp, c.cp, sizes_.cp});
  places.push_back({Axis::kTp, c.tp, sizes_.tp});
  return places;
}

std::vector<int> Grid::ranks_along(AxisSet axes, int rank) const {
  std::vector<int> ranks = {0};  // numbers of the ranks' prefixes, axis by axis
  for (const Place& place : places(axes, rank)) {
    std::vector<int> longer;
    const bool free = axes.has(place.axis);
    for (const int prefix : ranks)
      for (int i = free ? 0 : place.at; i < (free ? place.size : place.at + 1); ++i)
        longer.push_back(prefix * place.size + i);
    ranks = std::move(longer);
  }
  return ranks;
}

int Grid::index_along(AxisSet axes, int rank) const {
  int index = 0;
  for (const Place& place : places(axes, rank))
    if (axes.has(place.axis)) index = index * place.size + place.at;
  return index;
}

int Grid::data_parallel_index(int rank) const {
  return index_along(AxisSet(Axis::kDpReplicate) | Axis::kDpShard, rank);
}

const std::vector<AxisSet>& group_axes() {
  static const std::vector<AxisSet> axes = {Axis::kTp,
                                            Axis::kCp,
                                            Axis::kDpShard,
                                            Axis::kDpReplicate,
                                            Axis::kPp,
                                            Axis::kEp,
                                            Axis::kEdpShard,
                                            Axis::kDpShard | Axis::kCp,
                                            Axis::kDpReplicate | Axis::kDpShard,
                                            kDenseAxes,
                                            kExpertDataAxes};
  return axes;
}

AxisSet without_trivial(const Grid& grid, AxisSet axes) {
  AxisSet kept = axes;
  for (const Axis axis : {Axis::kTp, Axis::kCp, Axis::kDpShard, Axis::kDpReplicate, Axis::kPp,
                          Axis::kEp, Axis::kEdpShard})
    if (axes.has(axis) && grid.size_of(axis) == 1) kept = kept.without(axis);
  return kept;
}

std::vector<AxisSet> distinct_groups(const Grid& grid) {
  std::vector<AxisSet> groups;
  for (const AxisSet axes : group_axes()) {
    const AxisSet kept = without_trivial(grid, axes);
    if (!kept.empty() && std::find(groups.begin(), groups.end(), kept) == groups.end())
      groups.push_back(kept);
  }
  return groups;
}

}  // namespace capstan::plan
