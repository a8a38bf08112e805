// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Adds transfers to the computations of a schedule. Sends follow their source, receives precede
// their use; the lists are built while all ranks run under rendezvous sends. Where they come to a
// stop, ranks wait in sends whose receive stands further down the list of a rank that waits itself:
// that receive is moved up into the group its rank waits in.
//
// Such a receive costs nothing if its value is there in time. Let the ideal times be those of
// buffered sends and late receives, and let a rank stand at the ideal start of its next
// computation. At a stop take the rank that stands earliest. It cannot wait for a value whose send
// is not posted: the sender would stand before that send, earlier still. So it waits in a send, the
// value is ready by the time it stands at, and the receiver stands there or later. Hence some
// receive can always be moved up without delay: every order that is legal with buffers gets lists
// that need none and, for the durations assumed here, keep its times.
#include <algorithm>
#include <deque>
#include <limits>
#include <map>
#include <optional>

#include "capstan/base/check.h"
#include "plan/schedule_internal.h"

namespace capstan::plan::schedules {
namespace {

// When each computation starts at best and when what it hands on is ready, one unit of time for a
// forward and for each half of a backward, transfers in no time.
class IdealTimes {
 public:
  IdealTimes(const Schedule& schedule, const std::vector<List>& orders)
      : schedule_(schedule), starts_(orders.size()) {
    const size_t cells = static_cast<size_t>(schedule.stages) * size_t(schedule.micro_batches);
    for (auto* table : {&forward_, &backward_}) table->assign(cells, kUnknown);
    std::vector<long> clocks(orders.size(), 0);
    for (bool moved = true; moved;) {
      moved = false;
      for (size_t rank = 0; rank < orders.size(); ++rank)
        while (starts_[rank].size() < orders[rank].size() &&
               run(rank, orders[rank][starts_[rank].size()], clocks[rank]))
          moved = true;
    }
    for (size_t rank = 0; rank < orders.size(); ++rank)
      CAPSTAN_CHECK(starts_[rank].size() == orders[rank].size(),
                    "schedule {}: the order of rank {} waits for itself", schedule.name, rank);
  }
  [[nodiscard]] long start(size_t rank, size_t computation) const {
    const auto& list = starts_[rank];
    return computation < list.size() ? list[computation] : std::numeric_limits<long>::max();
  }
  // End of the forward (output) or of the backward or input half (gradient) of a stage.
  [[nodiscard]] long ready(bool gradient, int stage, int micro_batch) const {
    return (gradient ? backward_
                     : forward_)[static_cast<size_t>(stage) * size_t(schedule_.micro_batches) +
                                 static_cast<size_t>(micro_batch)];
  }

 private:
  static constexpr long kUnknown = -1;
  bool run(size_t rank, const Instruction& work, long& clock) {
    const int stage = schedule_.stage_of[rank][static_cast<size_t>(work.chunk)];
    const bool gradient = work.op != Op::kForward;
    const int source = stage + (gradient ? 1 : -1);
    long begin = clock;
    if (work.op != Op::kBackwardWeight && source >= 0 && source < schedule_.stages) {
      const long input = ready(gradient, source, work.micro_batch);
      if (input == kUnknown) return false;
      begin = std::max(begin, input);
    }
    starts_[rank].push_back(begin);
    clock = begin + (work.op == Op::kBackward ? 2 : 1);
    if (work.op != Op::kBackwardWeight)
      (gradient ? backward_
                : forward_)[static_cast<size_t>(stage) * size_t(schedule_.micro_batches) +
                            static_cast<size_t>(work.micro_batch)] = clock;
    return true;
  }

  const Schedule& schedule_;
  std::vector<std::vector<long>> starts_;  // [rank][computation]
  std::vector<long> forward_, backward_;   // [stage][micro-batch]
};

class Builder {
 public:
  Builder(Schedule& schedule, const std::vector<List>& orders)
      : schedule_(schedule),
        orders_(orders),
        channels_(schedule),
        ranks_(orders.size()),
        waiting_(static_cast<size_t>(channels_.count)) {
    const size_t cells = static_cast<size_t>(schedule.stages) * size_t(schedule.micro_batches);
    has_activation_.assign(cells, false);
    has_gradient_.assign(cells, false);
    schedule_.ranks.assign(orders.size(), {});
    for (size_t rank = 0; rank < orders.size(); ++rank) {
      ranks_[rank].backwards.assign(schedule.stage_of[rank].size(), 0);
      for (const Instruction& i : orders[rank])
        if (i.op != Op::kForward) ++ranks_[rank].backwards[static_cast<size_t>(i.chunk)];
      schedule_.ranks[rank].reserve(orders[rank].size() * 3);
    }
  }

  void run() {
    for (;;) {
      bool moved = false;
      for (size_t rank = 0; rank < ranks_.size(); ++rank)
        while (advance(rank)) moved = true;
      if (moved) continue;
      if (std::all_of(ranks_.begin(), ranks_.end(), [](const Rank& r) { return r.is_done; }))
        return;
      resolve_stop();
    }
  }

 private:
  struct Rank {
    size_t next = 0;          // computation
    int open = 0;             // transfers of the current group without counterpart
    int group = -1;           // current
    bool send_due = false;    // of the computation before `next`
    bool reduce_due = false;  // likewise
    bool is_done = false;
    std::vector<int> backwards;  // left, by chunk
  };
  // Posted transfers without counterpart; never both. A receive is posted for one send only.
  struct Waiting {
    struct Send {
      Instruction instruction;
      int from, to_stage;
    };
    std::deque<Send> sends;
    int receiver = -1;                 // rank that waits for the next send,
    int stage = -1, micro_batch = -1;  // and for what
  };

  [[nodiscard]] int stage_of(size_t rank, const Instruction& i) const {
    return schedule_.stage_of[rank][static_cast<size_t>(i.chunk)];
  }
  [[nodiscard]] std::vector<bool>::reference received(Op op, int stage, int micro_batch) {
    auto& cells = is_gradient(op) ? has_gradient_ : has_activation_;
    return cells[static_cast<size_t>(stage) * size_t(schedule_.micro_batches) +
                 static_cast<size_t>(micro_batch)];
  }
  void emit(size_t rank, Op op, int chunk, int micro_batch, int peer = -1) {
    schedule_.ranks[rank].push_back({op, chunk, micro_batch, peer, ranks_[rank].group});
  }

  bool advance(size_t rank) {
    Rank& r = ranks_[rank];
    if (r.open > 0 || r.is_done) return false;
    if (r.send_due) {
      r.send_due = false;
      post_send(rank, orders_[rank][r.next - 1]);
    } else if (r.reduce_due) {
      r.reduce_due = false;
      ++r.group;
      emit(rank, Op::kReduce, orders_[rank][r.next - 1].chunk, 0);
    } else if (r.next == orders_[rank].size()) {
      ++r.group;
      if (schedule_.pass == Pass::kTrain) emit(rank, Op::kStep, 0, 0);
      r.is_done = true;
    } else if (needs_receive(rank, orders_[rank][r.next])) {
      post_receive(rank, orders_[rank][r.next]);
    } else {
      compute(rank, orders_[rank][r.next]);
    }
    return true;
  }

  static Op receive_for(Op compute) {
    return compute == Op::kForward ? Op::kReceiveActivation : Op::kReceiveGradient;
  }
  bool needs_receive(size_t rank, const Instruction& work) {
    if (work.op == Op::kBackwardWeight) return false;
    const Op op = receive_for(work.op);
    const int stage = stage_of(rank, work);
    return channels_.of(op, stage) >= 0 && !received(op, stage, work.micro_batch);
  }

  void compute(size_t rank, const Instruction& work) {
    Rank& r = ranks_[rank];
    ++r.group;
    ++r.next;
    emit(rank, work.op, work.chunk, work.micro_batch);
    if (work.op != Op::kForward) r.reduce_due = --r.backwards[static_cast<size_t>(work.chunk)] == 0;
    const Op send = work.op == Op::kForward ? Op::kSendActivation : Op::kSendGradient;
    r.send_due = work.op != Op::kBackwardWeight && channels_.of(send, stage_of(rank, work)) >= 0;
  }

  void post_send(size_t rank, const Instruction& work) {
    const bool forward = work.op == Op::kForward;
    const Op op = forward ? Op::kSendActivation : Op::kSendGradient;
    const int stage = stage_of(rank, work), to = stage + (forward ? 1 : -1);
    ++ranks_[rank].group;
    ++ranks_[rank].open;
    emit(rank, op, work.chunk, work.micro_batch, schedule_.rank_of[static_cast<size_t>(to)]);
    const auto channel = static_cast<size_t>(channels_.of(op, stage));
    waiting_[channel].sends.push_back(
        {{op, work.chunk, work.micro_batch}, static_cast<int>(rank), to});
    match(channel);
  }

  void post_receive(size_t rank, const Instruction& work) {
    ++ranks_[rank].group;
    add_receive(rank, receive_for(work.op), work.chunk, work.micro_batch);
  }
  void add_receive(size_t rank, Op op, int chunk, int micro_batch) {
    const int stage = schedule_.stage_of[rank][static_cast<size_t>(chunk)];
    const int from = stage + (op == Op::kReceiveActivation ? -1 : 1);
    emit(rank, op, chunk, micro_batch, schedule_.rank_of[static_cast<size_t>(from)]);
    ++ranks_[rank].open;
    received(op, stage, micro_batch) = true;
    const auto channel = static_cast<size_t>(channels_.of(op, stage));
    Waiting& w = waiting_[channel];
    w.receiver = static_cast<int>(rank);
    w.stage = stage;
    w.micro_batch = micro_batch;
    match(channel);
  }

  void match(size_t channel) {
    Waiting& w = waiting_[channel];
    if (w.sends.empty() || w.receiver < 0) return;
    const Waiting::Send& send = w.sends.front();
    CAPSTAN_CHECK(w.stage == send.to_stage && w.micro_batch == send.instruction.micro_batch,
                  "schedule {}: rank {} receives in another order than rank {} sends",
                  schedule_.name, w.receiver, send.from);
    --ranks_[static_cast<size_t>(send.from)].open;
    --ranks_[static_cast<size_t>(w.receiver)].open;
    w.sends.pop_front();
    w.receiver = -1;
  }

  // Receives of the next computation may join the group their rank waits in at no price, so these
  // come first; failing that, the one whose value has been ready for longest.
  void resolve_stop() {
    bool moved = false;
    size_t best = waiting_.size();
    long best_slack = 0;
    for (size_t channel = 0; channel < waiting_.size(); ++channel) {
      if (waiting_[channel].sends.empty()) continue;
      const Waiting::Send& send = waiting_[channel].sends.front();
      if (is_next(send)) {
        move_up(channel);
        moved = true;
        continue;
      }
      const long slack = slack_of(send);
      if (best == waiting_.size() || slack > best_slack) {
        best = channel;
        best_slack = slack;
      }
    }
    if (moved) return;
    CAPSTAN_CHECK(best < waiting_.size() && best_slack >= 0,
                  "the order of schedule {} waits for itself", schedule_.name);
    move_up(best);
  }
  // Time from the moment a value is ready to the next computation of its receiver.
  [[nodiscard]] long slack_of(const Waiting::Send& send) {
    if (!times_) times_.emplace(schedule_, orders_);
    const bool gradient = is_gradient(send.instruction.op);
    const size_t rank = receiver_of(send);
    return times_->start(rank, ranks_[rank].next) -
           times_->ready(gradient, send.to_stage + (gradient ? 1 : -1),
                         send.instruction.micro_batch);
  }
  [[nodiscard]] size_t receiver_of(const Waiting::Send& send) const {
    return static_cast<size_t>(schedule_.rank_of[static_cast<size_t>(send.to_stage)]);
  }
  bool is_next(const Waiting::Send& send) {
    const size_t rank = receiver_of(send);
    if (ranks_[rank].next == orders_[rank].size()) return false;
    const Instruction& next = orders_[rank][ranks_[rank].next];
    const bool same_kind = next.op != Op::kBackwardWeight &&
                           is_gradient(receive_for(next.op)) == is_gradient(send.instruction.op);
    return same_kind && stage_of(rank, next) == send.to_stage &&
           next.micro_batch == send.instruction.micro_batch;
  }
  void move_up(size_t channel) {
    const Waiting::Send send = waiting_[channel].sends.front();
    const size_t rank = receiver_of(send);
    const auto& stages = schedule_.stage_of[rank];
    const auto chunk = std::find(stages.begin(), stages.end(), send.to_stage) - stages.begin();
    const Op op = is_gradient(send.instruction.op) ? Op::kReceiveGradient : Op::kReceiveActivation;
    add_receive(rank, op, static_cast<int>(chunk), send.instruction.micro_batch);
  }

  Schedule& schedule_;
  const std::vector<List>& orders_;
  Channels channels_;
  std::optional<IdealTimes> times_;  // made at the first stop that needs it
  std::vector<Rank> ranks_;
  std::vector<Waiting> waiting_;                     // by channel
  std::vector<bool> has_activation_, has_gradient_;  // [stage][micro-batch] receive is listed
};

}  // namespace

Channels::Channels(const Schedule& schedule) {
  const auto stages = static_cast<size_t>(schedule.stages);
  activation_of.assign(stages, -1);
  gradient_of.assign(stages, -1);
  std::map<std::pair<int, int>, int> activations, gradients;  // from, to -> channel
  const auto find = [&](auto& table, size_t from, size_t to) {
    const int a = schedule.rank_of[from], b = schedule.rank_of[to];
    if (a == b) return -1;
    const auto [it, is_new] = table.try_emplace({a, b}, count);
    if (is_new) ++count;
    return it->second;
  };
  for (size_t stage = 0; stage + 1 < stages; ++stage) {
    activation_of[stage] = find(activations, stage, stage + 1);
    gradient_of[stage + 1] = find(gradients, stage + 1, stage);
  }
}

int Channels::of(Op op, int stage) const {
  const auto at = static_cast<size_t>(stage);
  switch (op) {
    case Op::kSendActivation:
      return activation_of[at];
    case Op::kReceiveActivation:
      return stage > 0 ? activation_of[at - 1] : -1;
    case Op::kSendGradient:
      return gradient_of[at];
    case Op::kReceiveGradient:
      return at + 1 < gradient_of.size() ? gradient_of[at + 1] : -1;
    default:
      return -1;
  }
}

void complete_lists(Schedule& schedule, const std::vector<List>& orders) {
  Builder(schedule, orders).run();
}

}  // namespace capstan::plan::schedules
