// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Runs a schedule without computing: rendezvous sends, one first-in first-out channel per direction
// and kind.
#include <fmt/format.h>

#include <cstdint>
#include <deque>

#include "plan/schedule_internal.h"

namespace capstan::plan {
namespace {

using schedules::Channels;
using schedules::is_compute;
using schedules::is_gradient;

bool is_transfer(Op op) { return is_send(op) || is_receive(op); }

// What keeps the run itself from starting: places and numbers outside the schedule.
std::vector<std::string> check_shape(const Schedule& schedule) {
  if (schedule.stages < 1 || schedule.micro_batches < 1 ||
      schedule.rank_of.size() != static_cast<size_t>(schedule.stages) ||
      schedule.stage_of.size() != schedule.ranks.size())
    return {"stage placement does not fit the number of stages and ranks"};
  std::vector<std::string> problems;
  std::vector<int> places(schedule.rank_of.size(), 0);
  for (size_t rank = 0; rank < schedule.ranks.size(); ++rank) {
    const std::vector<int>& stages = schedule.stage_of[rank];
    for (const int stage : stages)
      if (stage < 0 || stage >= schedule.stages || ++places[static_cast<size_t>(stage)] > 1 ||
          schedule.rank_of[static_cast<size_t>(stage)] != static_cast<int>(rank))
        problems.push_back(fmt::format("rank {}: stage {} is not placed here", rank, stage));
    for (const Instruction& i : schedule.ranks[rank])
      if (i.chunk < 0 || static_cast<size_t>(i.chunk) >= stages.size() || i.micro_batch < 0 ||
          i.micro_batch >= schedule.micro_batches)
        problems.push_back(
            fmt::format("rank {}: {} of micro-batch {}, chunk {}: outside the "
                        "schedule",
                        rank, name_of(i.op), i.micro_batch, i.chunk));
  }
  for (size_t stage = 0; stage < places.size(); ++stage)
    if (places[stage] == 0) problems.push_back(fmt::format("stage {} has no rank", stage));
  return problems;
}

class Run {
 public:
  explicit Run(const Schedule& schedule)
      : schedule_(schedule),
        channels_(schedule),
        queues_(static_cast<size_t>(channels_.count)),
        ranks_(schedule.ranks.size()),
        done_(static_cast<size_t>(schedule.stages) * size_t(schedule.micro_batches), 0),
        reduced_(static_cast<size_t>(schedule.stages), false),
        trains_(schedule.pass == Pass::kTrain) {}

  std::vector<std::string> problems() {
    check_groups();
    for (bool moved = true; moved;) {
      moved = false;
      for (size_t rank = 0; rank < ranks_.size(); ++rank)
        while (advance(rank)) moved = true;
    }
    report_waiting();
    if (problems_.empty()) report_missing();
    return std::move(problems_);
  }

 private:
  struct Posted {
    size_t rank;
    const Instruction* instruction;
  };
  struct Queue {
    std::deque<Posted> sends, receives;
  };
  struct Rank {
    size_t at = 0;         // next instruction
    size_t group_end = 0;  // of the transfers that are issued
    int open = 0;          // those without counterpart
    bool has_stepped = false;
  };

  [[nodiscard]] int stage_of(size_t rank, const Instruction& i) const {
    return schedule_.stage_of[rank][static_cast<size_t>(i.chunk)];
  }
  [[nodiscard]] uint16_t& cell(int micro_batch, int stage) {
    return done_[static_cast<size_t>(stage) * size_t(schedule_.micro_batches) +
                 static_cast<size_t>(micro_batch)];
  }
  static uint16_t bit(Op op) { return static_cast<uint16_t>(1u << static_cast<unsigned>(op)); }
  [[nodiscard]] bool has(Op op, int micro_batch, int stage) {
    return (cell(micro_batch, stage) & bit(op)) != 0;
  }
  [[nodiscard]] bool has_gradient(int micro_batch, int stage) {  // of the input of a stage
    return has(Op::kBackward, micro_batch, stage) || has(Op::kBackwardInput, micro_batch, stage);
  }
  [[nodiscard]] bool has_backward(int micro_batch, int stage) {
    return has(Op::kBackward, micro_batch, stage) || (has(Op::kBackwardInput, micro_batch, stage) &&
                                                      has(Op::kBackwardWeight, micro_batch, stage));
  }
  [[nodiscard]] bool is_local(int stage, int other) const {
    return schedule_.rank_of[static_cast<size_t>(stage)] ==
           schedule_.rank_of[static_cast<size_t>(other)];
  }
  void complain(size_t rank, const Instruction& i, const std::string& why) {
    problems_.push_back(fmt::format("rank {}: {} of micro-batch {}, chunk {}: {}", rank,
                                    name_of(i.op), i.micro_batch, i.chunk, why));
  }

  void check_groups() {
    for (size_t rank = 0; rank < schedule_.ranks.size(); ++rank) {
      const auto& list = schedule_.ranks[rank];
      for (size_t i = 1; i < list.size(); ++i)
        if (list[i].group == list[i - 1].group &&
            !(is_transfer(list[i].op) && is_transfer(list[i - 1].op)))
          complain(rank, list[i], "in a group with its neighbour");
    }
  }

  // Runs what can be run next on a rank: one computation, or the transfers of one group, all issued
  // at once and left only when every one of them has met its counterpart.
  bool advance(size_t rank) {
    Rank& r = ranks_[rank];
    const auto& list = schedule_.ranks[rank];
    if (r.at < r.group_end) {
      if (r.open > 0) return false;
      r.at = r.group_end;
      return true;
    }
    if (r.at == list.size()) return false;
    const Instruction& i = list[r.at];
    if (!is_transfer(i.op)) {
      compute(rank, i);
      r.group_end = ++r.at;
      return true;
    }
    while (r.group_end < list.size() && list[r.group_end].group == i.group &&
           is_transfer(list[r.group_end].op))
      post(rank, list[r.group_end++]);
    return true;
  }

  void post(size_t rank, const Instruction& i) {
    const int stage = stage_of(rank, i);
    const bool up = i.op == Op::kSendActivation || i.op == Op::kReceiveGradient;
    const int other = stage + (up ? 1 : -1);
    if (other < 0 || other >= schedule_.stages)
      return complain(rank, i, "there is no stage at the other end");
    if (is_local(stage, other)) return complain(rank, i, "the other end is on the same rank");
    if (schedule_.rank_of[static_cast<size_t>(other)] != i.peer)
      return complain(rank, i,
                      fmt::format("peer is {}, stage {} is on another rank", i.peer, other));
    if (ranks_[rank].has_stepped) complain(rank, i, "comes after the optimizer step");
    if (is_gradient(i.op) && !trains_) complain(rank, i, "the pass has no backward");
    if (is_send(i.op)) {
      const bool has_source = i.op == Op::kSendActivation ? has(Op::kForward, i.micro_batch, stage)
                                                          : has_gradient(i.micro_batch, stage);
      if (!has_source) complain(rank, i, "nothing to send yet");
    }
    ++ranks_[rank].open;
    Queue& queue = queues_[static_cast<size_t>(channels_.of(i.op, stage))];
    (is_send(i.op) ? queue.sends : queue.receives).push_back({rank, &i});
    while (!queue.sends.empty() && !queue.receives.empty()) {
      match(queue.sends.front(), queue.receives.front());
      queue.sends.pop_front();
      queue.receives.pop_front();
    }
  }

  void match(const Posted& send, const Posted& receive) {
    const Instruction &sent = *send.instruction, &got = *receive.instruction;
    const int stage = stage_of(receive.rank, got);
    if (sent.micro_batch != got.micro_batch ||
        stage_of(send.rank, sent) != stage + (is_gradient(got.op) ? 1 : -1))
      complain(receive.rank, got, "the order of receives differs from the order of sends");
    mark(receive.rank, got, stage);
    --ranks_[send.rank].open;
    --ranks_[receive.rank].open;
  }

  void mark(size_t rank, const Instruction& i, int stage) {
    uint16_t& done = cell(i.micro_batch, stage);
    if ((done & bit(i.op)) != 0) complain(rank, i, "done twice");
    done = static_cast<uint16_t>(done | bit(i.op));
  }

  void compute(size_t rank, const Instruction& i) {
    const int stage = stage_of(rank, i);
    if (ranks_[rank].has_stepped) complain(rank, i, "comes after the optimizer step");
    if (i.op != Op::kForward && !trains_) complain(rank, i, "the pass has no backward");
    if (i.op == Op::kReduce) return reduce(rank, i, stage);
    if (i.op == Op::kStep) return step(rank, i);
    check_inputs(rank, i, stage);
    mark(rank, i, stage);
  }

  void check_inputs(size_t rank, const Instruction& i, int stage) {
    const int m = i.micro_batch;
    if (i.op == Op::kBackwardWeight) {
      if (!has(Op::kBackwardInput, m, stage)) complain(rank, i, "its input half was not run");
      return;
    }
    const bool forward = i.op == Op::kForward;
    if (!forward && !has(Op::kForward, m, stage)) complain(rank, i, "its forward was not run");
    if (!forward && has_gradient(m, stage)) complain(rank, i, "its gradient was made before");
    const int source = stage + (forward ? -1 : 1);
    if (source < 0 || source >= schedule_.stages) return;
    if (!is_local(stage, source)) {
      if (!has(forward ? Op::kReceiveActivation : Op::kReceiveGradient, m, stage))
        complain(rank, i, fmt::format("its {} was not received", forward ? "input" : "gradient"));
    } else if (!(forward ? has(Op::kForward, m, source) : has_gradient(m, source))) {
      complain(rank, i, fmt::format("stage {} on the same rank was not run before it", source));
    }
  }

  void reduce(size_t rank, const Instruction& i, int stage) {
    for (int m = 0; m < schedule_.micro_batches; ++m)
      if (!has_backward(m, stage)) {
        complain(rank, i, fmt::format("gradients of the chunk are not final, micro-batch {}", m));
        break;
      }
    if (reduced_[static_cast<size_t>(stage)]) complain(rank, i, "done twice");
    reduced_[static_cast<size_t>(stage)] = true;
  }
  void step(size_t rank, const Instruction& i) {
    for (const int stage : schedule_.stage_of[rank])
      if (!reduced_[static_cast<size_t>(stage)])
        complain(rank, i, fmt::format("stage {} was not reduced", stage));
    ranks_[rank].has_stepped = true;
  }

  void report_waiting() {
    for (size_t rank = 0; rank < ranks_.size(); ++rank)
      if (ranks_[rank].at < schedule_.ranks[rank].size())
        complain(rank, schedule_.ranks[rank][ranks_[rank].at],
                 "deadlock: waits for its counterpart for ever");
  }

  void report_missing() {
    for (int stage = 0; stage < schedule_.stages; ++stage) {
      for (int m = 0; m < schedule_.micro_batches; ++m)
        if (!has(Op::kForward, m, stage) || has_backward(m, stage) != trains_)
          problems_.push_back(fmt::format("incomplete: stage {}, micro-batch {}", stage, m));
      if (reduced_[static_cast<size_t>(stage)] != trains_)
        problems_.push_back(fmt::format("incomplete: reduction of stage {}", stage));
    }
    for (size_t rank = 0; rank < ranks_.size(); ++rank)
      if (ranks_[rank].has_stepped != trains_)
        problems_.push_back(fmt::format("incomplete: optimizer step of rank {}", rank));
  }

  const Schedule& schedule_;
  Channels channels_;
  std::vector<Queue> queues_;
  std::vector<Rank> ranks_;
  std::vector<uint16_t> done_;  // [stage][micro-batch], one bit per Op
  std::vector<bool> reduced_;   // by stage
  bool trains_;
  std::vector<std::string> problems_;
};

}  // namespace

std::vector<std::string> check_schedule(const Schedule& schedule) {
  std::vector<std::string> problems = check_shape(schedule);
  return problems.empty() ? Run(schedule).problems() : problems;
}

}  // namespace capstan::plan
