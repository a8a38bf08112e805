// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/plan/schedule.h"

#include <fmt/format.h>

#include <algorithm>

#include "capstan/base/check.h"
#include "capstan/base/error.h"
#include "capstan/base/text.h"
#include "plan/schedule_internal.h"

namespace capstan::plan {
namespace {

using schedules::Kind;
using schedules::Shape;

const Kind* find_kind(const std::string& name) {
  const std::vector<Kind>& kinds = schedules::kinds();
  const auto found =
      std::find_if(kinds.begin(), kinds.end(), [&](const Kind& k) { return k.name == name; });
  return found == kinds.end() ? nullptr : &*found;
}

ErrorText unknown_kind(const std::string& name) {
  const std::vector<std::string> names = schedule_names();
  const auto near = nearest_name(name, names);
  return {.module = "plan",
          .what = "parallel.pipeline.schedule",
          .got = quote(name),
          .need = "one of " + join(names, ", "),
          .fix = near ? "Did you mean " + *near + "?" : ""};
}

std::optional<ErrorText> chunks_problem(const Kind& kind, int chunks) {
  if (chunks >= kind.least_chunks && chunks <= kind.most_chunks) return std::nullopt;
  std::string need = std::to_string(kind.least_chunks);
  if (kind.most_chunks == kind.least_chunks + 1)
    need += fmt::format(" or {}", kind.most_chunks);
  else if (kind.most_chunks > kind.least_chunks)
    need += " or more";
  return ErrorText{.module = "plan",
                   .what = "parallel.pipeline.chunks",
                   .got = std::to_string(chunks),
                   .need = need,
                   .why = fmt::format("schedule {} has that many stages per rank", kind.name)};
}

std::optional<ErrorText> rounds_problem(const Kind& kind, int ranks, int micro_batches) {
  if (!kind.in_rounds || ranks == 1 || micro_batches % ranks == 0) return std::nullopt;
  const int below = micro_batches / ranks * ranks;
  std::string nearest = std::to_string(below + ranks);
  if (below > 0) nearest = fmt::format("{} or {}", below, nearest);
  return ErrorText{
      .module = "plan",
      .what = "micro-batches per step",
      .got = std::to_string(micro_batches),
      .need = fmt::format("a multiple of the {} pipeline ranks, nearest {}", ranks, nearest),
      .why = fmt::format("schedule {} runs rounds of one micro-batch per rank", kind.name),
      .fix = "Change batch.global_samples or batch.micro_samples, or take schedule 1f1b"};
}

std::optional<ErrorText> find_problem(const std::string& kind, const Shape& shape) {
  const Kind* found = find_kind(kind);
  if (!found) return unknown_kind(kind);
  if (auto problem = chunks_problem(*found, shape.chunks)) return problem;
  if (shape.pass != Pass::kTrain) return std::nullopt;
  return rounds_problem(*found, shape.ranks, shape.micro_batches);
}

void place_stages(Schedule& schedule, const Kind& kind, const Shape& shape) {
  schedule.stage_of.assign(static_cast<size_t>(shape.ranks), {});
  schedule.rank_of.assign(static_cast<size_t>(schedule.stages), 0);
  for (int rank = 0; rank < shape.ranks; ++rank)
    for (int chunk = 0; chunk < shape.chunks; ++chunk) {
      const int stage = schedules::place(kind, shape, rank, chunk);
      schedule.stage_of[static_cast<size_t>(rank)].push_back(stage);
      schedule.rank_of[static_cast<size_t>(stage)] = rank;
    }
}

}  // namespace

const char* name_of(Op op) {
  switch (op) {
    case Op::kForward:
      return "forward";
    case Op::kBackward:
      return "backward";
    case Op::kBackwardInput:
      return "backward_input";
    case Op::kBackwardWeight:
      return "backward_weight";
    case Op::kSendActivation:
      return "send_activation";
    case Op::kReceiveActivation:
      return "receive_activation";
    case Op::kSendGradient:
      return "send_gradient";
    case Op::kReceiveGradient:
      return "receive_gradient";
    case Op::kReduce:
      return "reduce";
    case Op::kStep:
      return "step";
  }
  return "?";
}

bool is_send(Op op) { return op == Op::kSendActivation || op == Op::kSendGradient; }
bool is_receive(Op op) { return op == Op::kReceiveActivation || op == Op::kReceiveGradient; }

std::vector<std::string> schedule_names() {
  std::vector<std::string> names;
  for (const Kind& kind : schedules::kinds()) names.emplace_back(kind.name);
  return names;
}

std::optional<std::string> schedule_problem(const std::string& kind, int ranks, int micro_batches,
                                            int chunks) {
  CAPSTAN_CHECK(ranks >= 1 && micro_batches >= 1, "{} pipeline ranks, {} micro-batches", ranks,
                micro_batches);
  const auto problem = find_problem(kind, {Pass::kTrain, ranks, micro_batches, chunks});
  if (!problem) return std::nullopt;
  std::string text = fmt::format("{}: got {}, need {}", problem->what, problem->got, problem->need);
  if (!problem->why.empty()) text += fmt::format(" ({})", problem->why);
  return text;
}

Schedule build_schedule(const std::string& kind, Pass pass, int stages, int micro_batches,
                        int chunks) {
  CAPSTAN_CHECK(stages >= 1 && micro_batches >= 1, "a schedule of {} stages, {} micro-batches",
                stages, micro_batches);
  const int ranks = chunks >= 1 ? std::max(stages / chunks, 1) : 1;
  const Shape shape{pass, ranks, micro_batches, chunks};
  if (const auto problem = find_problem(kind, shape)) throw ConfigError(*problem);
  CAPSTAN_CHECK(stages % chunks == 0, "{} stages in {} chunks per rank", stages, chunks);

  Schedule schedule;
  schedule.name = kind;
  schedule.pass = pass;
  schedule.stages = stages;
  schedule.micro_batches = micro_batches;
  const Kind& found = *find_kind(kind);
  place_stages(schedule, found, shape);
  std::vector<schedules::List> orders;
  for (int rank = 0; rank < ranks; ++rank) orders.push_back(found.order(shape, rank));
  schedules::complete_lists(schedule, orders);
  return schedule;
}

int peak_in_flight(const Schedule& schedule, int pipeline_rank) {
  int now = 0, peak = 0;
  for (const Instruction& i : schedule.ranks.at(static_cast<size_t>(pipeline_rank))) {
    if (i.op == Op::kForward) peak = std::max(peak, ++now);
    // Without a backward nothing is kept; weight halves still need what their forward saved.
    const bool frees = i.op == Op::kBackward || i.op == Op::kBackwardWeight ||
                       (i.op == Op::kForward && schedule.pass != Pass::kTrain);
    if (frees) --now;
  }
  return peak;
}

}  // namespace capstan::plan
