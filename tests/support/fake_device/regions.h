// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Which bytes a tensor covers, and who touched the bytes of a block last.
#pragma once
#include <ATen/core/Tensor.h>

#include <map>
#include <vector>

#include "support/fake_device/timeline.h"

namespace capstan::test::fake {

struct Region {
  size_t begin = 0, end = 0;
};

// In bytes from the start of the storage. Exact up to kMostRegions runs of contiguous bytes, else
// the span from first to last.
inline constexpr int64_t kMostRegions = 256;
std::vector<Region> regions_of(const at::Tensor& tensor);

// Caller holds state_mutex().
class RegionHistory {
 public:
  void restart(size_t bytes, const Access& write);
  // Throw MissingWait.
  void check(Region region, bool is_write, const Access& now);
  void check_reuse(int stream) const;
  void remember(Region region, bool is_write, const Access& now);

 private:
  struct Segment {
    Access write;
    std::vector<Access> reads;  // since the write, the last one of each stream
  };
  using Segments = std::map<size_t, Segment>;  // by first byte; each ends where the next begins
  // The segments of exactly this region.
  std::pair<Segments::iterator, Segments::iterator> cut(Region region);
  void split_at(size_t place);

  Segments segments_;
};

}  // namespace capstan::test::fake
