// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The order in which a pipeline rank computes, per kind of schedule. F forward, B backward, I and W
// its halves; p ranks, m micro-batches.
#include <algorithm>

#include "plan/schedule_internal.h"

namespace capstan::plan::schedules {
namespace {

bool trains(const Shape& shape) { return shape.pass == Pass::kTrain; }

// One micro-batch after the other, through the chunks in order and back.
List one_by_one(const Shape& shape, bool split) {
  List list;
  for (int m = 0; m < shape.micro_batches; ++m) {
    for (int chunk = 0; chunk < shape.chunks; ++chunk) list.push_back({Op::kForward, chunk, m});
    for (int chunk = shape.chunks - 1; chunk >= 0 && trains(shape); --chunk) {
      list.push_back({split ? Op::kBackwardInput : Op::kBackward, chunk, m});
      if (split) list.push_back({Op::kBackwardWeight, chunk, m});
    }
  }
  return list;
}

// The forward half of every kind whose stages go round the ranks: rounds of one micro-batch per
// rank, each through all chunks before the next round begins. The last round may be short.
List forwards_in_rounds(const Shape& shape) {
  List list;
  for (int begin = 0; begin < shape.micro_batches; begin += shape.ranks)
    for (int chunk = 0; chunk < shape.chunks; ++chunk)
      for (int m = begin; m < std::min(begin + shape.ranks, shape.micro_batches); ++m)
        list.push_back({Op::kForward, chunk, m});
  return list;
}

List gpipe_order(const Shape& shape, int) {
  if (shape.ranks == 1) return one_by_one(shape, false);
  List list = forwards_in_rounds(shape);
  for (int m = 0; m < shape.micro_batches && trains(shape); ++m)
    list.push_back({Op::kBackward, 0, m});
  return list;
}

// `warmup` forwards, then one forward and one backward in turn, then the other backwards.
List alternate(const List& forwards, const List& backwards, size_t warmup) {
  List list(forwards.begin(), forwards.begin() + static_cast<long>(warmup));
  for (size_t k = 0; k < backwards.size(); ++k) {
    if (warmup + k < forwards.size()) list.push_back(forwards[warmup + k]);
    list.push_back(backwards[k]);
  }
  return list;
}

List one_f_one_b_order(const Shape& shape, int rank) {
  if (shape.ranks == 1) return one_by_one(shape, false);
  const List forwards = forwards_in_rounds(shape);
  if (!trains(shape)) return forwards;
  List backwards;
  for (int m = 0; m < shape.micro_batches; ++m) backwards.push_back({Op::kBackward, 0, m});
  const int warmup = std::min(shape.ranks - 1 - rank, shape.micro_batches);
  return alternate(forwards, backwards, static_cast<size_t>(warmup));
}

// A rank may run ahead by the way to the last rank and back, twice its distance, and by the rounds
// of the chunks that follow.
List interleaved_order(const Shape& shape, int rank) {
  if (shape.ranks == 1) return one_by_one(shape, false);
  const List forwards = forwards_in_rounds(shape);
  if (!trains(shape)) return forwards;
  List backwards;
  for (const Instruction& f : forwards)
    backwards.push_back({Op::kBackward, shape.chunks - 1 - f.chunk, f.micro_batch});
  const size_t ahead =
      static_cast<size_t>(2 * (shape.ranks - 1 - rank) + (shape.chunks - 1) * shape.ranks);
  return alternate(forwards, backwards, std::min(ahead, forwards.size()));
}

// ZB-H1: 1f1b whose weight halves lag `rank` micro-batches behind the input halves, so that every
// rank holds what rank 0 of 1f1b holds and no rank waits once its first gradient has come.
List zero_bubble_one_chunk(const Shape& shape, int rank) {
  const int warmup = std::min(shape.ranks - rank, shape.micro_batches);
  List list;
  for (int m = 0; m < warmup; ++m) list.push_back({Op::kForward, 0, m});
  for (int k = 0; k < shape.micro_batches; ++k) {
    list.push_back({Op::kBackwardInput, 0, k});
    if (k >= rank) list.push_back({Op::kBackwardWeight, 0, k - rank});
    if (warmup + k < shape.micro_batches) list.push_back({Op::kForward, 0, warmup + k});
  }
  for (int k = std::max(0, shape.micro_batches - rank); k < shape.micro_batches; ++k)
    list.push_back({Op::kBackwardWeight, 0, k});
  return list;
}

// Numbers the micro-batches of each chunk and operation as they are added.
class VeeOrder {
 public:
  explicit VeeOrder(int micro_batches) : micro_batches_(micro_batches) {}
  [[nodiscard]] int count(Op op, int chunk) const { return counts_[index(op)][chunk]; }
  void add(Op op, int chunk) {
    const int m = counts_[index(op)][chunk]++;
    if (m < micro_batches_) list_.push_back({op, chunk, m});
  }
  void backward(int chunk) {
    add(Op::kBackwardInput, chunk);
    add(Op::kBackwardWeight, chunk);
  }
  [[nodiscard]] List take() { return std::move(list_); }

 private:
  static size_t index(Op op) { return op == Op::kForward ? 0 : op == Op::kBackwardInput ? 1 : 2; }
  int micro_batches_;
  int counts_[3][2] = {};
  List list_;
};

// ZB-V. All durations equal, rank r computes without a gap from time r on: every phase below is as
// long as the way of the first micro-batch down the first chunks and up the second ones needs.
// Fewer than 2p micro-batches run as the first ones of 2p.
List zero_bubble_vee(const Shape& shape, int rank) {
  const int p = shape.ranks, total = std::max(shape.micro_batches, 2 * p);
  VeeOrder order(shape.micro_batches);
  for (int i = 0; i < 2 * (p - rank) - 1; ++i) order.add(Op::kForward, 0);
  for (int i = 0; i < rank; ++i) {
    order.add(Op::kForward, 1);
    order.add(Op::kForward, 0);
  }
  for (int i = 0; i < p - rank; ++i) {
    order.add(Op::kForward, 1);
    order.backward(1);
  }
  while (order.count(Op::kForward, 1) < total) {
    if (order.count(Op::kForward, 0) < total) order.add(Op::kForward, 0);
    order.backward(0);
    order.add(Op::kForward, 1);
    order.backward(1);
  }
  // The last gradients leave first; the weight halves fill the time until the next one comes.
  for (int i = 0; i < rank; ++i) {
    order.add(Op::kBackwardInput, 0);
    order.add(Op::kBackwardInput, 1);
  }
  for (int i = 0; i < p - rank; ++i) order.backward(0);
  for (const int chunk : {1, 0})
    while (order.count(Op::kBackwardWeight, chunk) < total) order.add(Op::kBackwardWeight, chunk);
  return order.take();
}

// A micro-batch enters every second tick; its two passes over a rank fall on odd and even ticks.
List vee_forwards(const Shape& shape, int rank) {
  const int way_back = 2 * (shape.ranks - 1 - rank) + 1;  // ticks between the two, odd
  List list;
  for (int tick = 0; tick < 2 * shape.micro_batches + way_back; ++tick) {
    const int first = tick / 2, second = (tick - way_back) / 2;
    if (tick % 2 == 0 && first < shape.micro_batches) list.push_back({Op::kForward, 0, first});
    if (tick % 2 == 1 && tick >= way_back) list.push_back({Op::kForward, 1, second});
  }
  return list;
}

List zero_bubble_order(const Shape& shape, int rank) {
  if (shape.ranks == 1) return one_by_one(shape, true);
  if (shape.chunks == 2)
    return trains(shape) ? zero_bubble_vee(shape, rank) : vee_forwards(shape, rank);
  return trains(shape) ? zero_bubble_one_chunk(shape, rank) : forwards_in_rounds(shape);
}

constexpr int kAnyNumber = 1 << 20;

}  // namespace

const std::vector<Kind>& kinds() {
  static const std::vector<Kind> table = {{"1f1b", 1, 1, false, one_f_one_b_order},
                                          {"gpipe", 1, 1, false, gpipe_order},
                                          {"interleaved", 2, kAnyNumber, true, interleaved_order},
                                          {"zero_bubble", 1, 2, false, zero_bubble_order}};
  return table;
}

int place(const Kind& kind, const Shape& shape, int rank, int chunk) {
  const bool back = kind.order == zero_bubble_order && chunk % 2 == 1;
  return chunk * shape.ranks + (back ? shape.ranks - 1 - rank : rank);
}

}  // namespace capstan::plan::schedules
