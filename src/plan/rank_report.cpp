// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "plan/rank_report_internal.h"

#include <algorithm>

#include "plan/saturate_internal.h"

namespace capstan::plan {
namespace {

RankReport report_rank(const Plan& plan, int rank) {
  const RankLayout layout = plan.model().layout.rank(rank);
  const ModelShape& shape = plan.model().shape;
  const ForwardFlops& forward = plan.flops.forward;
  const Grid::Sizes& sizes = plan.grid.sizes();
  RankReport report;
  report.rank = rank;
  report.coord = plan.grid.coord(rank);
  report.blocks = layout.blocks;
  for (const FlatBuffer& buffer : layout.buffers)
    for (const LocalParam& param : buffer.params) report.parameters += param.real.numel();
  const auto layers = std::count_if(layout.blocks.begin(), layout.blocks.end(), [&](int block) {
    return block > 0 && block < shape.head_block();
  });
  const double tokens = static_cast<double>(plan.batch.samples_per_rank) *
                        static_cast<double>(plan.batch.sequence_length) / (sizes.cp * sizes.tp);
  const double layer_tokens =
      tokens * static_cast<double>(layers) / static_cast<double>(shape.num_hidden_layers);
  const double in_layers = layer_tokens * (forward.linear + forward.attention);
  const bool scores = layout.blocks.back() == shape.head_block();
  report.flops = 3 * (in_layers + (scores ? tokens * forward.head : 0));
  const RemadeParts remade = remade_parts(plan.resolved.parallel.recompute);
  if (plan.resolved.parallel.recompute.mode == "block") report.flops_again = in_layers;
  if (remade.attention) report.flops_again += layer_tokens * forward.again_attention;
  if (remade.mlp) report.flops_again += layer_tokens * forward.again_mlp;
  report.memory = report_memory(plan, rank);
  report.traffic = predict_traffic(plan, rank);
  return report;
}

}  // namespace

std::vector<RankReport> report_ranks(const Plan& plan) {
  std::vector<RankReport> reports;
  for (int pp = 0; pp < plan.grid.sizes().pp; ++pp)
    reports.push_back(report_rank(plan, plan.grid.rank_of({.pp = pp})));
  return reports;
}

std::map<std::string, int64_t> bytes_by_axis(const Traffic& traffic) {
  std::map<std::string, int64_t> bytes;
  for (const auto& [key, entry] : traffic) {
    int64_t& sum = bytes[key.substr(0, key.find('/'))];
    sum = std::min(sum + entry.bytes, kSaturated);
  }
  return bytes;
}

}  // namespace capstan::plan
