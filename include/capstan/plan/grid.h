// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The grid of ranks. Words: axis = a dimension of this grid, dim = a dimension of a tensor. tp
// varies fastest, then cp, dp_shard, dp_replicate, pp. The expert view folds the same ranks into pp
// x dp_replicate x edp_shard x ep, ep fastest, with edp_shard * ep = dp_shard * cp * tp: the ranks
// that hold different experts (ep) and those that hold copies of the same (dp_replicate,
// edp_shard).
#pragma once
#include <string>
#include <vector>

namespace capstan::plan {

enum class Axis : unsigned {
  kTp = 1,
  kCp = 2,
  kDpShard = 4,
  kDpReplicate = 8,
  kPp = 16,
  kEp = 32,
  kEdpShard = 64
};
// A set of axes, e.g. Axis::kCp | Axis::kDpShard.
class AxisSet {
 public:
  constexpr AxisSet() = default;
  constexpr AxisSet(Axis axis) : bits_(static_cast<unsigned>(axis)) {}  // NOLINT: one axis is a set
  constexpr AxisSet operator|(AxisSet other) const { return AxisSet(bits_ | other.bits_); }
  [[nodiscard]] constexpr bool has(Axis axis) const {
    return (bits_ & static_cast<unsigned>(axis)) != 0;
  }
  [[nodiscard]] constexpr AxisSet without(AxisSet other) const {
    return AxisSet(bits_ & ~other.bits_);
  }
  [[nodiscard]] constexpr bool empty() const { return bits_ == 0; }
  [[nodiscard]] constexpr unsigned bits() const { return bits_; }
  constexpr bool operator==(const AxisSet&) const = default;

 private:
  constexpr explicit AxisSet(unsigned bits) : bits_(bits) {}
  unsigned bits_ = 0;
};
constexpr AxisSet operator|(Axis a, Axis b) { return AxisSet(a) | AxisSet(b); }
// The ranks that see different data: dense gradients are summed over these.
inline constexpr AxisSet kDenseAxes = AxisSet(Axis::kDpReplicate) | Axis::kDpShard | Axis::kCp;
// Gradients of experts are summed over these: every rank that is not along ep sees other tokens.
inline constexpr AxisSet kExpertDataAxes = AxisSet(Axis::kDpReplicate) | Axis::kEdpShard;
inline constexpr AxisSet kAllAxes = kDenseAxes | Axis::kTp | Axis::kPp;
[[nodiscard]] std::string name_of(AxisSet axes);  // "dp_replicate+dp_shard+cp"; "none" when empty

struct Coord {
  int pp = 0, dp_replicate = 0, dp_shard = 0, cp = 0, tp = 0;
  bool operator==(const Coord&) const = default;
};

class Grid {
 public:
  Grid() = default;
  struct Sizes {
    int pp = 1, dp_replicate = 1, dp_shard = 1, cp = 1, tp = 1, ep = 1;
    bool operator==(const Sizes&) const = default;
  };
  // Throws InternalError for sizes below 1, more ranks than an int counts, or ep that does not
  // divide dp_shard x cp x tp (experts never spread over dp_replicate).
  explicit Grid(const Sizes& sizes);

  [[nodiscard]] const Sizes& sizes() const { return sizes_; }
  [[nodiscard]] int size() const;
  [[nodiscard]] int size_of(AxisSet axes) const;
  [[nodiscard]] int data_parallel_size() const { return sizes_.dp_replicate * sizes_.dp_shard; }
  [[nodiscard]] int expert_shard_size() const;  // edp_shard
  [[nodiscard]] Coord coord(int rank) const;
  [[nodiscard]] int rank_of(const Coord& coord) const;
  // Ranks that differ from `rank` in these axes only, ascending; `rank` is among them. A set names
  // axes of one view: kEp and kEdpShard go with kPp and kDpReplicate, not with kDpShard, kCp, kTp.
  [[nodiscard]] std::vector<int> ranks_along(AxisSet axes, int rank) const;
  [[nodiscard]] int index_along(AxisSet axes, int rank) const;  // position of `rank` in ranks_along
  [[nodiscard]] int data_parallel_index(
      int rank) const;  // dp_replicate x dp_shard, dp_shard fastest
  bool operator==(const Grid&) const = default;

 private:
  struct Place {
    Axis axis;
    int at, size;
  };
  [[nodiscard]] std::vector<Place> places(AxisSet axes, int rank) const;
  Sizes sizes_;
};

// Axes along which every run has a communicator: kTp to kEdpShard alone, and what gradients and
// rows travel over.
[[nodiscard]] const std::vector<AxisSet>& group_axes();
// Without the axes of length one, which do not change a group.
[[nodiscard]] AxisSet without_trivial(const Grid& grid, AxisSet axes);
// Those of group_axes() that have more than one rank, sets of the same ranks once.
[[nodiscard]] std::vector<AxisSet> distinct_groups(const Grid& grid);

}  // namespace capstan::plan
