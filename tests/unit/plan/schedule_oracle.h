// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A second reader of schedules that shares no code with check_schedule: it executes the lists on
// numbers, as the engine does on tensors (sends are buffered, receives wait), and compares what
// comes out of every stage with the chain of all stages computed in one place.
#pragma once
#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <utility>

#include "capstan/plan/schedule.h"

namespace capstan::plan::testing {

inline uint64_t mix(uint64_t a, uint64_t b) {
  uint64_t x = a * 0x9e3779b97f4a7c15u + b + 1;
  x ^= x >> 29;
  x *= 0xbf58476d1ce4e5b9u;
  return x ^ (x >> 32);
}

class Oracle {
 public:
  explicit Oracle(const Schedule& schedule)
      : schedule_(schedule), at_(schedule.ranks.size(), 0), stores_(schedule.ranks.size()) {}

  // "" or what went wrong first.
  std::string run() {
    for (bool moved = true; moved;) {
      moved = false;
      for (size_t rank = 0; rank < at_.size(); ++rank)
        while (problem_.empty() && at_[rank] < schedule_.ranks[rank].size() &&
               execute(static_cast<int>(rank), schedule_.ranks[rank][at_[rank]])) {
          ++at_[rank];
          moved = true;
        }
    }
    if (!problem_.empty()) return problem_;
    for (size_t rank = 0; rank < at_.size(); ++rank)
      if (at_[rank] != schedule_.ranks[rank].size()) return "rank waits for ever";
    for (const auto& [channel, values] : channels_)
      if (!values.empty()) return "a value nobody received";
    return check_results();
  }

 private:
  using Key = std::pair<int, int>;  // chunk, micro-batch
  struct Store {
    std::map<Key, uint64_t> inputs, outputs, output_gradients, input_gradients;
    std::set<int> reduced;
    bool has_stepped = false;
  };

  bool fail(const std::string& why) {
    if (problem_.empty()) problem_ = why;
    return true;
  }
  static std::optional<uint64_t> find(const std::map<Key, uint64_t>& table, Key key) {
    const auto it = table.find(key);
    return it == table.end() ? std::nullopt : std::optional(it->second);
  }
  // Where the value of a neighbouring stage is kept, if that stage is on this rank.
  std::optional<int> local_chunk(int rank, int stage) const {
    const auto& stages = schedule_.stage_of[static_cast<size_t>(rank)];
    for (size_t chunk = 0; chunk < stages.size(); ++chunk)
      if (stages[chunk] == stage) return static_cast<int>(chunk);
    return std::nullopt;
  }

  bool execute(int rank, const Instruction& i) {
    Store& store = stores_[static_cast<size_t>(rank)];
    const Key key{i.chunk, i.micro_batch};
    if (store.has_stepped) return fail("work after the step");
    if (is_receive(i.op)) return receive(rank, store, i);
    const int stage = schedule_.stage_of[static_cast<size_t>(rank)][static_cast<size_t>(i.chunk)];
    switch (i.op) {
      case Op::kForward:
        return forward(rank, store, key, stage);
      case Op::kBackward:
      case Op::kBackwardInput:
        if (!backward(rank, store, key, stage)) return fail("backward without gradient");
        if (i.op == Op::kBackward) return weight(store, stage, key);
        return true;
      case Op::kBackwardWeight:
        if (!find(store.input_gradients, key)) return fail("weight half before the input half");
        return weight(store, stage, key);
      case Op::kReduce:
        if (!store.reduced.insert(i.chunk).second) return fail("reduced twice");
        for (int m = 0; m < schedule_.micro_batches; ++m)
          if (!weights_.contains({stage, m})) return fail("reduced before the last backward");
        return true;
      case Op::kStep:
        store.has_stepped = true;
        if (store.reduced.size() != schedule_.stage_of[static_cast<size_t>(rank)].size())
          return fail("step without reduction");
        return true;
      default:
        return send(rank, store, i);
    }
  }

  bool forward(int rank, Store& store, Key key, int stage) {
    std::optional<uint64_t> input = uint64_t{7};
    if (stage > 0) {
      const auto local = local_chunk(rank, stage - 1);
      input = local ? find(store.outputs, {*local, key.second}) : find(store.inputs, key);
    }
    if (!input) return fail("forward without input");
    if (!store.outputs
             .emplace(key, mix(*input, mix(static_cast<uint64_t>(stage),
                                           static_cast<uint64_t>(key.second))))
             .second)
      return fail("forward twice");
    return true;
  }
  bool backward(int rank, Store& store, Key key, int stage) {
    std::optional<uint64_t> gradient = uint64_t{9};
    if (stage + 1 < schedule_.stages) {
      const auto local = local_chunk(rank, stage + 1);
      gradient = local ? find(store.input_gradients, {*local, key.second})
                       : find(store.output_gradients, key);
    }
    const auto output = find(store.outputs, key);
    return gradient && output && store.input_gradients.emplace(key, mix(*gradient, *output)).second;
  }
  bool weight(Store&, int stage, Key key) {
    if (!weights_.insert({stage, key.second}).second) return fail("weight gradient twice");
    return true;
  }
  bool send(int rank, Store& store, const Instruction& i) {
    const bool gradient = i.op == Op::kSendGradient;
    const auto value =
        find(gradient ? store.input_gradients : store.outputs, {i.chunk, i.micro_batch});
    if (!value) return fail("nothing to send");
    channels_[{rank, i.peer, gradient}].push_back(*value);
    return true;
  }
  bool receive(int rank, Store& store, const Instruction& i) {
    const bool gradient = i.op == Op::kReceiveGradient;
    auto& channel = channels_[{i.peer, rank, gradient}];
    if (channel.empty()) return false;
    auto& table = gradient ? store.output_gradients : store.inputs;
    const bool is_new = table.emplace(Key{i.chunk, i.micro_batch}, channel.front()).second;
    channel.pop_front();
    return is_new || fail("received twice");
  }

  std::string check_results() const {
    const bool trains = schedule_.pass == Pass::kTrain;
    const auto cells = static_cast<size_t>(schedule_.stages * schedule_.micro_batches);
    if (weights_.size() != (trains ? cells : 0)) return "weight gradients missing";
    for (const Store& store : stores_)
      if (store.has_stepped != trains) return "step missing";
    for (int m = 0; m < schedule_.micro_batches; ++m) {
      uint64_t value = 7, gradient = 9;
      std::map<int, uint64_t> outputs;
      for (int stage = 0; stage < schedule_.stages; ++stage) {
        value = mix(value, mix(static_cast<uint64_t>(stage), static_cast<uint64_t>(m)));
        outputs[stage] = value;
        if (result(&Store::outputs, stage, m) != value) return "wrong output of a stage";
      }
      for (int stage = schedule_.stages - 1; stage >= 0 && trains; --stage) {
        gradient = mix(gradient, outputs[stage]);
        if (result(&Store::input_gradients, stage, m) != gradient) return "wrong gradient";
      }
    }
    return "";
  }
  std::optional<uint64_t> result(std::map<Key, uint64_t> Store::*table, int stage, int m) const {
    const int rank = schedule_.rank_of[static_cast<size_t>(stage)];
    return find(stores_[static_cast<size_t>(rank)].*table, {*local_chunk(rank, stage), m});
  }

  const Schedule& schedule_;
  std::vector<size_t> at_;
  std::vector<Store> stores_;
  std::map<std::tuple<int, int, bool>, std::deque<uint64_t>> channels_;  // from, to, gradient
  std::set<std::pair<int, int>> weights_;                                // stage, micro-batch
  std::string problem_;
};

inline std::string execute(const Schedule& schedule) { return Oracle(schedule).run(); }

}  // namespace capstan::plan::testing
