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
  return size;
}

int Grid::expert_data_parallel_size() const { return size() / sizes_.pp / sizes_.ep; }

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

std::vector<int> Grid::ranks_along(AxisSet axes, int rank) const {
  const Coord base = coord(rank);
  const auto range = [&](Axis axis, int at, int size) {
    return axes.has(axis) ? std::pair(0, size) : std::pair(at, at + 1);
  };
  const auto [pp_begin, pp_end] = range(Axis::kPp, base.pp, sizes_.pp);
  const auto [dr_begin, dr_end] = range(Axis::kDpReplicate, base.dp_replicate, sizes_.dp_replicate);
  const auto [ds_begin, ds_end] = range(Axis::kDpShard, base.dp_shard, sizes_.dp_shard);
  const auto [cp_begin, cp_end] = range(Axis::kCp, base.cp, sizes_.cp);
  const auto [tp_begin, tp_end] = range(Axis::kTp, base.tp, sizes_.tp);
  std::vector<int> ranks;
  ranks.reserve(static_cast<size_t>(size_of(axes)));
  for (int pp = pp_begin; pp < pp_end; ++pp)
    for (int dr = dr_begin; dr < dr_end; ++dr)
      for (int ds = ds_begin; ds < ds_end; ++ds)
        for (int cp = cp_begin; cp < cp_end; ++cp)
          for (int tp = tp_begin; tp < tp_end; ++tp) ranks.push_back(rank_of({pp, dr, ds, cp, tp}));
  return ranks;
}

int Grid::index_along(AxisSet axes, int rank) const {
  const Coord c = coord(rank);
  int index = 0;
  const auto add = [&](Axis axis, int at, int size) {
    if (axes.has(axis)) index = index * size + at;
  };
  add(Axis::kPp, c.pp, sizes_.pp);
  add(Axis::kDpReplicate, c.dp_replicate, sizes_.dp_replicate);
  add(Axis::kDpShard, c.dp_shard, sizes_.dp_shard);
  add(Axis::kCp, c.cp, sizes_.cp);
  add(Axis::kTp, c.tp, sizes_.tp);
  return index;
}

int Grid::data_parallel_index(int rank) const {
  return index_along(AxisSet(Axis::kDpReplicate) | Axis::kDpShard, rank);
}

int Grid::expert_index(int rank) const {
  CAPSTAN_CHECK(rank >= 0 && rank < size(), "rank {} is outside a grid of {} ranks", rank, size());
  return rank % sizes_.ep;
}

// Within a stage, ranks are numbered edp x ep with ep fastest; a stage's ranks are consecutive and
// their number divides by ep, so the position of a rank in its ep group is rank % ep.
std::vector<int> Grid::expert_ranks(int rank) const {
  const int first = rank - expert_index(rank);
  std::vector<int> ranks;
  for (int i = 0; i < sizes_.ep; ++i) ranks.push_back(first + i);
  return ranks;
}

std::vector<int> Grid::expert_data_ranks(int rank) const {
  const int stage_ranks = size() / sizes_.pp;
  const int first = rank / stage_ranks * stage_ranks + expert_index(rank);
  std::vector<int> ranks;
  for (int i = 0; i < expert_data_parallel_size(); ++i) ranks.push_back(first + i * sizes_.ep);
  return ranks;
}

}  // namespace capstan::plan
