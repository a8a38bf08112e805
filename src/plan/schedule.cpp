// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/plan/schedule.h"

#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <map>

#include "capstan/base/check.h"
#include "capstan/base/error.h"
#include "capstan/base/text.h"

namespace capstan::plan {
namespace {

using List = std::vector<Instruction>;
// Order of the computations of one pipeline rank, transfers left out.
using OrderBuilder = std::function<List(const Schedule& schedule, int rank)>;

// All forwards, then all backwards. A single stage runs each micro-batch to its end instead.
List gpipe_order(const Schedule& schedule, int) {
  List list;
  const auto add = [&](Op op, int micro_batch) { list.push_back({op, 0, micro_batch}); };
  const bool one_by_one = schedule.stages == 1;
  for (int m = 0; m < schedule.micro_batches; ++m) {
    add(Op::kForward, m);
    if (one_by_one && schedule.pass == Pass::kTrain) add(Op::kBackward, m);
  }
  for (int m = 0; m < schedule.micro_batches && !one_by_one && schedule.pass == Pass::kTrain; ++m)
    add(Op::kBackward, m);
  return list;
}

struct Kind {
  int chunks;  // allowed chunks per rank
  OrderBuilder order;
};

const std::map<std::string, Kind>& kinds() {
  static const std::map<std::string, Kind> table = {{"gpipe", {1, gpipe_order}}};
  return table;
}

[[noreturn]] void refuse_kind(const std::string& kind) {
  const std::vector<std::string> known = {"1f1b", "interleaved", "zero_bubble"};
  const std::vector<std::string> names = schedule_names();
  const bool is_later = std::find(known.begin(), known.end(), kind) != known.end();
  throw ConfigError(ErrorText{.module = "plan",
                              .what = "parallel.pipeline.schedule",
                              .got = quote(kind) + (is_later ? ", which is not in this build" : ""),
                              .need = "one of " + join(names, ", ")});
}

bool is_backward(Op op) { return op == Op::kBackward || op == Op::kBackwardInput; }

// Receives go right before their use, sends right after their source; gradients of a chunk are
// final after its last backward.
List add_transfers(const Schedule& schedule, const List& order, int rank) {
  std::map<int, size_t> last_backward;  // chunk -> place in `order`
  for (size_t i = 0; i < order.size(); ++i)
    if (is_backward(order[i].op) || order[i].op == Op::kBackwardWeight)
      last_backward[order[i].chunk] = i;
  List list;
  const auto add = [&](Op op, const Instruction& source, int peer) {
    list.push_back({op, source.chunk, source.micro_batch, peer, static_cast<int>(list.size())});
  };
  const auto peer_of = [&](int stage) { return schedule.rank_of[static_cast<size_t>(stage)]; };
  for (size_t i = 0; i < order.size(); ++i) {
    const Instruction& work = order[i];
    const int stage = schedule.stage_of[static_cast<size_t>(rank)][static_cast<size_t>(work.chunk)];
    const bool forward = work.op == Op::kForward, backward = is_backward(work.op);
    const bool has_before = stage > 0, has_after = stage + 1 < schedule.stages;
    if (forward && has_before) add(Op::kReceiveActivation, work, peer_of(stage - 1));
    if (backward && has_after) add(Op::kReceiveGradient, work, peer_of(stage + 1));
    add(work.op, work, -1);
    if (forward && has_after) add(Op::kSendActivation, work, peer_of(stage + 1));
    if (backward && has_before) add(Op::kSendGradient, work, peer_of(stage - 1));
    const auto last = last_backward.find(work.chunk);
    if (last != last_backward.end() && last->second == i)
      add(Op::kReduce, {Op::kReduce, work.chunk, 0}, -1);
  }
  if (schedule.pass == Pass::kTrain) add(Op::kStep, {Op::kStep, 0, 0}, -1);
  return list;
}

void place_stages(Schedule& schedule, int ranks, int chunks) {
  schedule.stage_of.assign(static_cast<size_t>(ranks),
                           std::vector<int>(static_cast<size_t>(chunks)));
  schedule.rank_of.assign(static_cast<size_t>(ranks) * static_cast<size_t>(chunks), 0);
  for (int stage = 0; stage < ranks * chunks; ++stage) {
    schedule.stage_of[static_cast<size_t>(stage % ranks)][static_cast<size_t>(stage / ranks)] =
        stage;
    schedule.rank_of[static_cast<size_t>(stage)] = stage % ranks;
  }
}

std::string draw_instruction(const Instruction& i, bool chunked) {
  const std::string chunk = chunked ? fmt::format(".{}", i.chunk) : "";
  switch (i.op) {
    case Op::kForward:
      return fmt::format("F{}{}", i.micro_batch, chunk);
    case Op::kBackward:
      return fmt::format("B{}{}", i.micro_batch, chunk);
    case Op::kBackwardInput:
      return fmt::format("I{}{}", i.micro_batch, chunk);
    case Op::kBackwardWeight:
      return fmt::format("W{}{}", i.micro_batch, chunk);
    case Op::kSendActivation:
      return fmt::format(">{}", i.peer);
    case Op::kReceiveActivation:
      return fmt::format("{}>", i.peer);
    case Op::kSendGradient:
      return fmt::format("<{}", i.peer);
    case Op::kReceiveGradient:
      return fmt::format("{}<", i.peer);
    case Op::kReduce:
      return "reduce" + chunk;
    case Op::kStep:
      return "step";
  }
  return "?";
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

std::vector<std::string> schedule_names() {
  std::vector<std::string> names;
  for (const auto& [name, kind] : kinds()) names.push_back(name);
  return names;
}

Schedule build_schedule(const std::string& kind, Pass pass, int stages, int micro_batches,
                        int chunks) {
  const auto found = kinds().find(kind);
  if (found == kinds().end()) refuse_kind(kind);
  if (chunks != found->second.chunks)
    throw ConfigError(ErrorText{.module = "plan",
                                .what = "parallel.pipeline.chunks",
                                .got = std::to_string(chunks),
                                .need = std::to_string(found->second.chunks),
                                .why = "schedule " + kind + " has that many stages per rank"});
  CAPSTAN_CHECK(stages >= 1 && micro_batches >= 1 && stages % chunks == 0,
                "a schedule of {} stages in {} chunks with {} micro-batches", stages, chunks,
                micro_batches);
  Schedule schedule;
  schedule.name = kind;
  schedule.pass = pass;
  schedule.stages = stages;
  schedule.micro_batches = micro_batches;
  const int ranks = stages / chunks;
  place_stages(schedule, ranks, chunks);
  for (int rank = 0; rank < ranks; ++rank)
    schedule.ranks.push_back(add_transfers(schedule, found->second.order(schedule, rank), rank));
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

std::string draw_schedule(const Schedule& schedule, int columns) {
  std::string text;
  for (size_t rank = 0; rank < schedule.ranks.size(); ++rank) {
    const bool chunked = schedule.stage_of[rank].size() > 1;
    std::vector<std::string> words;
    for (const Instruction& i : schedule.ranks[rank]) words.push_back(draw_instruction(i, chunked));
    std::string line = join(words, " ");
    const auto room = static_cast<size_t>(std::max(columns, 40));
    if (line.size() > room) {
      const size_t head = line.rfind(' ', room / 2),
                   tail = line.find(' ', line.size() - room / 2 + 5);
      line = line.substr(0, head) + " ..." + line.substr(tail);
    }
    text += fmt::format("rank {} | {}\n", rank, line);
  }
  return text;
}

}  // namespace capstan::plan
