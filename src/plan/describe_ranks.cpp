// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The part of the page that compares pipeline ranks.
#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "capstan/base/bytes.h"
#include "plan/describe_internal.h"
#include "plan/rank_report_internal.h"

namespace capstan::plan {
namespace {

// "0-8", or "0-3 12-15" for several chunks.
std::string runs_of(const std::vector<int>& blocks) {
  std::string text;
  for (size_t i = 0; i < blocks.size();) {
    size_t end = i;
    while (end + 1 < blocks.size() && blocks[end + 1] == blocks[end] + 1) ++end;
    text += (text.empty() ? "" : " ") + std::to_string(blocks[i]);
    if (end > i) text += "-" + std::to_string(blocks[end]);
    i = end + 1;
  }
  constexpr size_t kMost = 14;
  return text.size() <= kMost ? text : fmt::format("{} blocks", blocks.size());
}

std::string states_table(const std::vector<RankReport>& reports) {
  std::string text = fmt::format("  {:>6} {:>14} {:>17} {:>9} {:>10} {:>10} {:>10} {:>10} {:>10}\n",
                                 "rank", "blocks", "parameters", "FLOPs", "peak", "weights",
                                 "gradients", "optimizer", "passes");
  for (const RankReport& r : reports) {
    const MemoryReport& m = r.memory;
    text += fmt::format("  {:>6} {:>14} {:>17} {:>9.3g} {:>10} {:>10} {:>10} {:>10} {:>10}\n",
                        r.rank, runs_of(r.blocks), format_count(r.parameters), r.flops,
                        format_bytes(m.run_peak()), format_bytes(m.parameters + m.master),
                        format_bytes(m.gradients), format_bytes(m.optimizer),
                        format_bytes(m.activations + m.workspace));
  }
  return text;
}

std::string traffic_table(const std::vector<RankReport>& reports) {
  std::set<std::string> axes;
  for (const RankReport& r : reports)
    for (const auto& [axis, bytes] : bytes_by_axis(r.traffic)) axes.insert(axis);
  if (axes.empty()) return {};
  const auto width = [](const std::string& axis) { return std::max<size_t>(axis.size(), 10); };
  std::string text = fmt::format("  {:>6}", "sent by");
  for (const std::string& axis : axes) text += fmt::format(" {:>{}}", axis, width(axis));
  text += "\n";
  for (const RankReport& r : reports) {
    text += fmt::format("  {:>7}", r.rank);
    const auto bytes = bytes_by_axis(r.traffic);
    for (const std::string& axis : axes) {
      const auto found = bytes.find(axis);
      text += fmt::format(" {:>{}}", found == bytes.end() ? "-" : format_bytes(found->second),
                          width(axis));
    }
    text += "\n";
  }
  return text;
}

}  // namespace

// One line per pipeline rank: its first rank stands for all.
std::string describe_ranks(const Plan& plan) {
  const std::vector<RankReport> reports = report_ranks(plan);
  const int each = plan.grid.size() / plan.grid.sizes().pp;
  std::string text = fmt::format("{:<12}per step; each line stands for {} rank{}\n", "ranks", each,
                                 each == 1 ? "" : "s alike");
  text += states_table(reports);
  if (reports.front().flops_again > 0)
    text += fmt::format("  blocks that are run again add {:.3g} FLOPs on rank {}\n",
                        reports.front().flops_again, reports.front().rank);
  if (reports.size() > 1) text += traffic_table(reports);
  return text;
}

}  // namespace capstan::plan
