// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Runs a schedule without computing: rendezvous sends, one first-in first-out channel per direction
// and kind.
#include <fmt/format.h>

#include <deque>
#include <map>
#include <set>
#include <tuple>

#include "capstan/plan/schedule.h"

namespace capstan::plan {
namespace {

bool is_send(Op op) { return op == Op::kSendActivation || op == Op::kSendGradient; }
bool is_receive(Op op) { return op == Op::kReceiveActivation || op == Op::kReceiveGradient; }
bool is_gradient(Op op) { return op == Op::kSendGradient || op == Op::kReceiveGradient; }

class Simulator {
 public:
  explicit Simulator(const Schedule& schedule) : schedule_(schedule) {
    at_.assign(schedule.ranks.size(), 0);
    open_.assign(schedule.ranks.size(), 0);
    posted_.assign(schedule.ranks.size(), false);
  }

  std::vector<std::string> run() {
    if (!is_shaped()) return problems_;
    for (bool moved = true; moved;) {
      moved = false;
      for (size_t rank = 0; rank < at_.size(); ++rank)
        while (advance(rank)) moved = true;
    }
    report_waiting();
    if (problems_.empty()) report_missing();
    return problems_;
  }

 private:
  using Key = std::tuple<size_t, size_t, bool>;  // from, to, is gradient
  struct Posted {
    size_t rank, at;
  };
  struct Channel {
    std::deque<Posted> sends, receives;
  };

  [[nodiscard]] const Instruction& instruction(size_t rank, size_t at) const {
    return schedule_.ranks[rank][at];
  }
  [[nodiscard]] int stage_of(size_t rank, const Instruction& i) const {
    return schedule_.stage_of[rank][static_cast<size_t>(i.chunk)];
  }
  [[nodiscard]] bool has(Op op, int micro_batch, int stage) const {
    return done_.contains({op, micro_batch, stage});
  }
  void complain(size_t rank, const Instruction& i, const std::string& why) {
    problems_.push_back(fmt::format("rank {}: {} of micro-batch {}, chunk {}: {}", rank,
                                    name_of(i.op), i.micro_batch, i.chunk, why));
  }

  bool is_shaped() {
    const auto stages = static_cast<size_t>(schedule_.stages);
    if (schedule_.rank_of.size() != stages || schedule_.stage_of.size() != schedule_.ranks.size()) {
      problems_.emplace_back("stage placement does not fit the number of stages and ranks");
      return false;
    }
    for (size_t rank = 0; rank < schedule_.ranks.size(); ++rank) {
      for (const int stage : schedule_.stage_of[rank])
        if (stage < 0 || stage >= schedule_.stages ||
            schedule_.rank_of[static_cast<size_t>(stage)] != static_cast<int>(rank))
          problems_.push_back(fmt::format("rank {}: stage {} is not placed here", rank, stage));
      for (const Instruction& i : schedule_.ranks[rank]) {
        const bool inside = i.chunk >= 0 &&
                            static_cast<size_t>(i.chunk) < schedule_.stage_of[rank].size() &&
                            i.micro_batch >= 0 && i.micro_batch < schedule_.micro_batches;
        if (!inside) complain(rank, i, "outside the schedule");
      }
    }
    return problems_.empty();
  }

  // Runs what can be run next on a rank: one computation, or the transfers of one group, all issued
  // at once and left only when every one of them has met its counterpart.
  bool advance(size_t rank) {
    if (at_[rank] == schedule_.ranks[rank].size()) return false;
    const Instruction& i = instruction(rank, at_[rank]);
    if (!is_send(i.op) && !is_receive(i.op)) {
      compute(rank, i);
      ++at_[rank];
      return true;
    }
    if (!posted_[rank]) {
      posted_[rank] = true;
      size_t end = at_[rank];
      for (; end < schedule_.ranks[rank].size(); ++end) {
        const Instruction& member = instruction(rank, end);
        if (member.group != i.group || !(is_send(member.op) || is_receive(member.op))) break;
        ++open_[rank];
        if (!post(rank, end)) --open_[rank];
      }
      group_end_[rank] = end;
    }
    if (open_[rank] > 0) return false;
    posted_[rank] = false;
    at_[rank] = group_end_[rank];
    return true;
  }

  bool post(size_t rank, size_t at) {
    const Instruction& i = instruction(rank, at);
    const int stage = stage_of(rank, i);
    const bool up = (i.op == Op::kSendActivation) || (i.op == Op::kReceiveGradient);
    const int other = stage + (up ? 1 : -1);
    if (other < 0 || other >= schedule_.stages) {
      complain(rank, i, "there is no stage at the other end");
      return false;
    }
    if (schedule_.rank_of[static_cast<size_t>(other)] != i.peer) {
      complain(rank, i, fmt::format("peer is {}, stage {} is on another rank", i.peer, other));
      return false;
    }
    const auto peer = static_cast<size_t>(i.peer);
    if (is_send(i.op)) {
      const bool has_source = i.op == Op::kSendActivation
                                  ? has(Op::kForward, i.micro_batch, stage)
                                  : has(Op::kBackward, i.micro_batch, stage) ||
                                        has(Op::kBackwardInput, i.micro_batch, stage);
      if (!has_source) complain(rank, i, "nothing to send yet");
    }
    const Key key =
        is_send(i.op) ? Key{rank, peer, is_gradient(i.op)} : Key{peer, rank, is_gradient(i.op)};
    Channel& channel = channels_[key];
    (is_send(i.op) ? channel.sends : channel.receives).push_back({rank, at});
    match(channel);
    return true;
  }

  void match(Channel& channel) {
    while (!channel.sends.empty() && !channel.receives.empty()) {
      const Posted send = channel.sends.front(), receive = channel.receives.front();
      channel.sends.pop_front();
      channel.receives.pop_front();
      const Instruction &sent = instruction(send.rank, send.at),
                        &got = instruction(receive.rank, receive.at);
      const int step = is_gradient(got.op) ? 1 : -1;
      const bool fits = sent.micro_batch == got.micro_batch &&
                        stage_of(send.rank, sent) == stage_of(receive.rank, got) + step;
      if (!fits)
        complain(receive.rank, got, "the order of receives differs from the order of sends");
      done_.insert({sent.op, sent.micro_batch, stage_of(send.rank, sent)});
      if (!done_.insert({got.op, got.micro_batch, stage_of(receive.rank, got)}).second)
        complain(receive.rank, got, "done twice");
      --open_[send.rank];
      --open_[receive.rank];
    }
  }

  void compute(size_t rank, const Instruction& i) {
    const int stage = stage_of(rank, i), m = i.micro_batch;
    const auto need = [&](bool ok, const char* why) {
      if (!ok) complain(rank, i, why);
    };
    if (i.op == Op::kForward) {
      need(stage == 0 || has(Op::kReceiveActivation, m, stage), "its input was not received");
    } else if (i.op == Op::kBackward || i.op == Op::kBackwardInput) {
      need(has(Op::kForward, m, stage), "its forward was not run");
      need(stage + 1 == schedule_.stages || has(Op::kReceiveGradient, m, stage),
           "its gradient was not received");
    } else if (i.op == Op::kBackwardWeight) {
      need(has(Op::kBackwardInput, m, stage), "its input half was not run");
    } else if (i.op == Op::kReduce) {
      for (int k = 0; k < schedule_.micro_batches; ++k)
        need(has_backward(k, stage), "gradients of the chunk are not final");
    } else if (i.op == Op::kStep) {
      for (const int own : schedule_.stage_of[rank])
        need(has(Op::kReduce, 0, own), "a chunk was not reduced");
    }
    const int place = i.op == Op::kStep ? static_cast<int>(rank) : stage;
    need(done_.insert({i.op, i.op == Op::kReduce || i.op == Op::kStep ? 0 : m, place}).second,
         "done twice");
    const bool late = stepped_.contains(rank);
    need(!late, "comes after the optimizer step");
    if (i.op == Op::kStep) stepped_.insert(rank);
  }

  [[nodiscard]] bool has_backward(int m, int stage) const {
    return has(Op::kBackward, m, stage) ||
           (has(Op::kBackwardInput, m, stage) && has(Op::kBackwardWeight, m, stage));
  }

  void report_waiting() {
    for (size_t rank = 0; rank < at_.size(); ++rank)
      if (at_[rank] < schedule_.ranks[rank].size())
        complain(rank, instruction(rank, at_[rank]),
                 "deadlock: waits for its counterpart for ever");
  }

  void report_missing() {
    const bool trains = schedule_.pass == Pass::kTrain;
    for (int stage = 0; stage < schedule_.stages; ++stage) {
      for (int m = 0; m < schedule_.micro_batches; ++m) {
        if (!has(Op::kForward, m, stage) || has_backward(m, stage) != trains)
          problems_.push_back(fmt::format("incomplete: stage {}, micro-batch {}", stage, m));
        if (has(Op::kBackward, m, stage) && has(Op::kBackwardInput, m, stage))
          problems_.push_back(fmt::format("two backwards: stage {}, micro-batch {}", stage, m));
      }
      if (has(Op::kReduce, 0, stage) != trains)
        problems_.push_back(fmt::format("incomplete: reduction of stage {}", stage));
    }
    for (size_t rank = 0; rank < at_.size(); ++rank)
      if (stepped_.contains(rank) != trains)
        problems_.push_back(fmt::format("incomplete: optimizer step of rank {}", rank));
  }

  const Schedule& schedule_;
  std::vector<std::string> problems_;
  std::vector<size_t> at_;    // next instruction
  std::vector<int> open_;     // transfers of the current group without counterpart
  std::vector<bool> posted_;  // the current group is issued
  std::map<size_t, size_t> group_end_;
  std::map<Key, Channel> channels_;
  std::set<std::tuple<Op, int, int>> done_;  // op, micro-batch, stage (rank for kStep)
  std::set<size_t> stepped_;
};

}  // namespace

std::vector<std::string> check_schedule(const Schedule& schedule) {
  return Simulator(schedule).run();
}

}  // namespace capstan::plan
