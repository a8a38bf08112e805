// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Runs a schedule in time, as the engine does: sends are issued and forgotten, receives wait.
#include <algorithm>
#include <cmath>
#include <deque>
#include <map>

#include "capstan/base/check.h"
#include "plan/schedule_internal.h"

namespace capstan::plan {
namespace {

using schedules::is_compute;

class Clocks {
 public:
  Clocks(const Schedule& schedule, const ScheduleCosts& costs)
      : schedule_(schedule),
        costs_(costs),
        channels_(schedule),
        arrivals_(static_cast<size_t>(channels_.count)),
        free_(static_cast<size_t>(channels_.count), 0),
        at_(schedule.ranks.size(), 0),
        sent_until_(schedule.ranks.size(), 0),
        clock_(schedule.ranks.size(), 0) {
    for (const auto* table : {&costs.forward, &costs.backward_input, &costs.backward_weight}) {
      CAPSTAN_CHECK(table->size() == 1 || table->size() == static_cast<size_t>(schedule.stages),
                    "{} costs for {} stages", table->size(), schedule.stages);
      for (const double cost : *table)
        CAPSTAN_CHECK(cost >= 0 && std::isfinite(cost), "a computation that takes {}", cost);
    }
    CAPSTAN_CHECK(costs.transfer >= 0 && std::isfinite(costs.transfer), "a transfer that takes {}",
                  costs.transfer);
    for (const auto& list : schedule.ranks) timeline_.spans.emplace_back(list.size());
  }

  Timeline run() {
    for (bool moved = true; moved;) {
      moved = false;
      for (size_t rank = 0; rank < at_.size(); ++rank)
        while (advance(rank)) moved = true;
    }
    for (size_t rank = 0; rank < at_.size(); ++rank)
      CAPSTAN_CHECK(at_[rank] == schedule_.ranks[rank].size(),
                    "schedule {}: rank {} waits for ever in {}", schedule_.name, rank,
                    name_of(schedule_.ranks[rank][at_[rank]].op));
    summarize();
    return std::move(timeline_);
  }

 private:
  [[nodiscard]] int stage_of(size_t rank, const Instruction& i) const {
    return schedule_.stage_of.at(rank).at(static_cast<size_t>(i.chunk));
  }
  [[nodiscard]] double duration(Op op, int stage) const {
    const auto of = [&](const std::vector<double>& table) {
      return table[table.size() == 1 ? 0 : static_cast<size_t>(stage)];
    };
    if (op == Op::kForward) return of(costs_.forward);
    double total = 0;
    if (op != Op::kBackwardWeight) total += of(costs_.backward_input);
    if (op != Op::kBackwardInput) total += of(costs_.backward_weight);
    return total;
  }

  // One computation, or all transfers of one group.
  bool advance(size_t rank) {
    const auto& list = schedule_.ranks[rank];
    const size_t begin = at_[rank];
    if (begin == list.size()) return false;
    if (!is_send(list[begin].op) && !is_receive(list[begin].op)) {
      Span& span = timeline_.spans[rank][at_[rank]++];
      span.start = clock_[rank];
      if (is_compute(list[begin].op))
        clock_[rank] += duration(list[begin].op, stage_of(rank, list[begin]));
      span.end = clock_[rank];
      return true;
    }
    if (begin >= sent_until_[rank]) send_group(rank);
    return receive_group(rank);
  }

  void send_group(size_t rank) {
    const auto& list = schedule_.ranks[rank];
    size_t end = at_[rank];
    for (; end < list.size() && list[end].group == list[at_[rank]].group; ++end) {
      if (!is_send(list[end].op)) {
        if (is_receive(list[end].op)) continue;
        break;
      }
      const size_t channel = channel_of(rank, list[end]);
      free_[channel] = std::max(free_[channel], clock_[rank]) + costs_.transfer;
      arrivals_[channel].push_back(free_[channel]);
      timeline_.spans[rank][end] = {clock_[rank], clock_[rank]};
    }
    sent_until_[rank] = end;
  }
  bool receive_group(size_t rank) {
    const auto& list = schedule_.ranks[rank];
    const size_t begin = at_[rank], end = sent_until_[rank];
    double done = clock_[rank];
    std::map<size_t, size_t> taken;  // channel -> arrivals that this group takes
    for (size_t i = begin; i < end; ++i) {
      if (!is_receive(list[i].op)) continue;
      const size_t channel = channel_of(rank, list[i]), place = taken[channel]++;
      if (place >= arrivals_[channel].size()) return false;
      const double arrival = std::max(clock_[rank], arrivals_[channel][place]);
      timeline_.spans[rank][i] = {clock_[rank], arrival};
      done = std::max(done, arrival);
    }
    for (const auto& [channel, count] : taken)
      arrivals_[channel].erase(arrivals_[channel].begin(),
                               arrivals_[channel].begin() + static_cast<long>(count));
    clock_[rank] = done;
    at_[rank] = end;
    return true;
  }
  [[nodiscard]] size_t channel_of(size_t rank, const Instruction& i) const {
    const int channel = channels_.of(i.op, stage_of(rank, i));
    CAPSTAN_CHECK(channel >= 0, "schedule {}: rank {}: {} has no other end", schedule_.name, rank,
                  name_of(i.op));
    return static_cast<size_t>(channel);
  }

  void summarize() {
    for (const double clock : clock_) timeline_.makespan = std::max(timeline_.makespan, clock);
    for (size_t rank = 0; rank < at_.size(); ++rank) {
      double busy = 0, first = -1, last = 0;
      for (size_t i = 0; i < schedule_.ranks[rank].size(); ++i) {
        if (!is_compute(schedule_.ranks[rank][i].op)) continue;
        const Span& span = timeline_.spans[rank][i];
        busy += span.end - span.start;
        if (first < 0) first = span.start;
        last = span.end;
      }
      timeline_.busy.push_back(busy);
      timeline_.bubble.push_back(timeline_.makespan > 0 ? 1 - busy / timeline_.makespan : 0);
      timeline_.occupied.push_back(last - std::max(first, 0.0));
    }
  }

  const Schedule& schedule_;
  const ScheduleCosts& costs_;
  schedules::Channels channels_;
  std::vector<std::deque<double>> arrivals_;  // by channel, not yet received
  std::vector<double> free_;                  // by channel: its last transfer has arrived
  std::vector<size_t> at_;                    // next instruction
  std::vector<size_t> sent_until_;            // sends before it are issued
  std::vector<double> clock_;
  Timeline timeline_;
};

}  // namespace

Timeline simulate_schedule(const Schedule& schedule, const ScheduleCosts& costs) {
  return Clocks(schedule, costs).run();
}

}  // namespace capstan::plan
