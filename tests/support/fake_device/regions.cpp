// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "support/fake_device/regions.h"

#include <fmt/format.h>

#include <algorithm>

#include "support/fake_device/fake_device.h"

namespace capstan::test::fake {
namespace {

struct Dim {
  int64_t stride_bytes, size;
};

// The dims that leave gaps, and how many contiguous bytes the others make.
std::pair<std::vector<Dim>, int64_t> split_dims(const at::Tensor& tensor) {
  const auto item = static_cast<int64_t>(tensor.itemsize());
  std::vector<Dim> dims, gaps;
  for (int64_t d = 0; d < tensor.dim(); ++d)
    if (tensor.size(d) > 1 && tensor.stride(d) != 0)
      dims.push_back({tensor.stride(d) * item, tensor.size(d)});
  std::sort(dims.begin(), dims.end(),
            [](const Dim& a, const Dim& b) { return a.stride_bytes < b.stride_bytes; });
  int64_t run = item;
  for (const Dim& dim : dims) {
    if (gaps.empty() && dim.stride_bytes <= run)
      run = dim.stride_bytes * (dim.size - 1) + run;
    else
      gaps.push_back(dim);
  }
  return {gaps, run};
}

[[noreturn]] void refuse(const Access& now, const char* does, const Access& before,
                         const char* did) {
  throw MissingWait(fmt::format(
      "missing wait: {} on stream {} {} memory that {} on stream {} {} and is not ordered behind "
      "it",
      now.op, now.stream, does, before.op, before.stream, did));
}

void remember_read(std::vector<Access>& reads, const Access& now) {
  for (Access& read : reads)
    if (read.stream == now.stream) {
      read = now;
      return;
    }
  reads.push_back(now);
}

}  // namespace

std::vector<Region> regions_of(const at::Tensor& tensor) {
  const auto first = static_cast<size_t>(tensor.storage_offset()) * tensor.itemsize();
  const auto [gaps, run] = split_dims(tensor);
  int64_t count = 1, span = run;
  for (const Dim& gap : gaps) {
    count *= gap.size;
    span += gap.stride_bytes * (gap.size - 1);
  }
  if (count > kMostRegions) return {{first, first + static_cast<size_t>(span)}};
  std::vector<Region> regions = {{first, first + static_cast<size_t>(run)}};
  for (const Dim& gap : gaps) {
    const size_t before = regions.size();
    for (int64_t i = 1; i < gap.size; ++i)
      for (size_t r = 0; r < before; ++r) {
        const auto shift = static_cast<size_t>(i * gap.stride_bytes);
        regions.push_back({regions[r].begin + shift, regions[r].end + shift});
      }
  }
  return regions;
}

void RegionHistory::restart(size_t bytes, const Access& write) {
  segments_.clear();
  segments_[0] = {write, {}};
  segments_[bytes] = {write, {}};  // the end
}

void RegionHistory::split_at(size_t place) {
  const auto after = segments_.lower_bound(place);
  if (after != segments_.end() && after->first == place) return;
  segments_.emplace_hint(after, place, std::prev(after)->second);
}

auto RegionHistory::cut(Region region) -> std::pair<Segments::iterator, Segments::iterator> {
  split_at(region.begin);
  split_at(region.end);
  return {segments_.find(region.begin), segments_.find(region.end)};
}

void RegionHistory::check(Region region, bool is_write, const Access& now) {
  const auto [first, last] = cut(region);
  const char* const does = is_write ? "writes" : "reads";
  for (auto s = first; s != last; ++s) {
    const Segment& segment = s->second;
    if (!is_ordered(segment.write, now.stream)) refuse(now, does, segment.write, "wrote");
    if (!is_write) continue;
    for (const Access& read : segment.reads)
      if (!is_ordered(read, now.stream)) refuse(now, does, read, "reads");
  }
}

void RegionHistory::remember(Region region, bool is_write, const Access& now) {
  const auto [first, last] = cut(region);
  if (is_write) {
    segments_.erase(std::next(first), last);
    first->second = {now, {}};
    return;
  }
  for (auto s = first; s != last; ++s) remember_read(s->second.reads, now);
}

void RegionHistory::check_reuse(int stream) const {
  const Access now = last_op(stream, "an allocation");
  for (const auto& [place, segment] : segments_) {
    if (!is_ordered(segment.write, stream)) refuse(now, "reuses freed", segment.write, "wrote");
    for (const Access& read : segment.reads)
      if (!is_ordered(read, stream)) refuse(now, "reuses freed", read, "reads");
  }
}

}  // namespace capstan::test::fake
