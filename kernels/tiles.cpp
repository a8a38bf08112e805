// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "capstan/base/check.h"
#include "capstan/kernels/optimizer.h"

namespace capstan::kernels {

std::vector<Tile> cut_tiles(std::span<const FlatRange> ranges) {
  std::vector<Tile> tiles;
  for (const FlatRange& range : ranges) {
    CAPSTAN_CHECK(0 <= range.begin && range.begin <= range.end, "tiles of [{}, {})", range.begin,
                  range.end);
    for (int64_t begin = range.begin; begin < range.end;) {
      const int64_t end = std::min(range.end, (begin / kTileElements + 1) * kTileElements);
      tiles.push_back({begin, static_cast<int32_t>(end - begin), range.flags,
                       range.index + static_cast<uint64_t>(begin - range.begin)});
      begin = end;
    }
  }
  return tiles;
}

}  // namespace capstan::kernels
