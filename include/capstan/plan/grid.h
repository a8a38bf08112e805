// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The grid of ranks. Words: axis = a dimension of this grid, dim = a dimension of a tensor. tp
// varies fastest, then cp, dp_shard, dp_replicate, pp. The expert view folds the same ranks into pp
// x edp x ep with edp * ep = dp_replicate * dp_shard * cp * tp.
#pragma once
#include <string>
#include <vector>

namespace capstan::plan {

enum class Axis : unsigned { kTp = 1, kCp = 2, kDpShard = 4, kDpReplicate = 8, kPp = 16 };
// A set of axes, e.g. Axis::kCp | Axis::kDpShard.
class AxisSet {
 public:
  constexpr AxisSet() = default;
  constexpr AxisSet(Axis axis) : bits_(static_cast<unsigned>(axis)) {}  // NOLINT: one axis is a set
  constexpr AxisSet operator|(AxisSet other) const { return AxisSet(bits_ | other.bits_); }
  [[nodiscard]] constexpr bool has(Axis axis) const {
    return (bits_ & static_cast<unsigned>(axis)) != 0;
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
  [[nodiscard]] int expert_data_parallel_size() const;  // edp
  [[nodiscard]] Coord coord(int rank) const;
  [[nodiscard]] int rank_of(const Coord& coord) const;
  // Ranks that differ from `rank` in these axes only, ascending; `rank` is among them.
  [[nodiscard]] std::vector<int> ranks_along(AxisSet axes, int rank) const;
  [[nodiscard]] int index_along(AxisSet axes, int rank) const;  // position of `rank` in ranks_along
  [[nodiscard]] int data_parallel_index(
      int rank) const;  // dp_replicate x dp_shard, dp_shard fastest
  // Expert view of the same ranks: ep varies fastest within a pipeline stage, then edp.
  [[nodiscard]] int expert_index(int rank) const;               // position along ep
  [[nodiscard]] std::vector<int> expert_ranks(int rank) const;  // differ along ep only, ascending
  [[nodiscard]] std::vector<int> expert_data_ranks(
      int rank) const;  // differ along edp only, ascending
  bool operator==(const Grid&) const = default;

 private:
  Sizes sizes_;
};

}  // namespace capstan::plan
