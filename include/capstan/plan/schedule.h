// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Pipeline schedules as data: one instruction list per pipeline rank. The engine runs it, the
// simulator times and draws it. A new kind is one function in src/plan/schedule_orders.cpp.
//
// Kinds (the values of parallel.pipeline.schedule), p = pipeline ranks, m = micro-batches:
//   gpipe        all forwards, then all backwards; m in flight. chunks = 1.
//   1f1b         backwards as early as possible; min(m, p - rank) in flight. chunks = 1.
//   interleaved  1f1b over chunks >= 2 stages per rank, placed round robin; m is a multiple of p.
//   zero_bubble  backwards in an input half and a weight half that fills the gaps.
//                chunks = 1: as many in flight as 1f1b's first rank (ZB-H1);
//                chunks = 2: rank r holds the stages r and 2p - 1 - r (ZB-V), at most 2p chunks.
// A single pipeline rank runs one micro-batch after the other, through its chunks in order and
// back: there is no pipeline to fill, and one micro-batch's activations are held.
//
// What the instructions mean, for the rank that runs them:
//   chunk                a stage of this rank: stage_of[rank][chunk]
//   kReceiveActivation   fills the input of the chunk; kSendActivation sends the chunk's output
//   kReceiveGradient     fills the gradient of the chunk's output; kSendGradient sends the gradient
//                        of the chunk's input (final after kBackward or kBackwardInput)
//   neighbour stage on the same rank: no transfer is listed, the value is handed over locally
//   channels             each ordered pair of ranks has one for activations and one for gradients;
//                        each is first in, first out, and they do not wait for each other
//   receives             stand right before their use, and earlier only where ranks that send
//                        without buffers would block each other; block until the value is there
//   sends                stand right after their source and need not block; their buffer is free
//                        when the transfer has completed
//   group                adjacent transfers of equal group are issued together (ncclGroupStart,
//                        ncclGroupEnd); a computation, reduction or step is alone in its group
//   kReduce, kStep       once per chunk, after its last backward and that one's sends; once, last
// The lists are proven free of deadlock for the strictest transport: sends that complete only when
// their receive is posted, every group completed before the next begins.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace capstan::plan {

enum class Op {
  kForward,
  kBackward,        // input and weight gradients
  kBackwardInput,   // zero-bubble: B
  kBackwardWeight,  // zero-bubble: W
  kSendActivation,
  kReceiveActivation,
  kSendGradient,
  kReceiveGradient,
  kReduce,  // gradients of `chunk` are final on this rank: its reductions may be issued
  kStep,    // optimizer
};
[[nodiscard]] const char* name_of(Op op);
[[nodiscard]] bool is_send(Op op);
[[nodiscard]] bool is_receive(Op op);

struct Instruction {
  Op op = Op::kForward;
  int chunk = 0;  // index into the rank's chunks
  int micro_batch = 0;
  int peer = -1;  // pipeline rank, sends and receives
  int group = 0;  // equal adjacent groups are issued together
  bool operator==(const Instruction&) const = default;
};

// Without backward, forwards and activation transfers only, for any number of micro-batches; a
// decode step is one micro-batch (or a few) that walks through all stages.
enum class Pass { kTrain, kForwardOnly, kDecode };

struct Schedule {
  std::string name;  // "gpipe"
  Pass pass = Pass::kTrain;
  int stages = 1, micro_batches = 1;
  std::vector<std::vector<Instruction>> ranks;  // by pipeline rank
  std::vector<std::vector<int>> stage_of;       // [pipeline rank][chunk] -> stage
  std::vector<int> rank_of;                     // [stage] -> pipeline rank
};

[[nodiscard]] std::vector<std::string> schedule_names();  // kinds of this build

// Why a step of this shape cannot be trained, with the nearest legal values; nullopt = it can.
[[nodiscard]] std::optional<std::string> schedule_problem(const std::string& kind, int ranks,
                                                          int micro_batches, int chunks);
// `stages` counts all stages, `chunks` those of one rank, so there are stages / chunks pipeline
// ranks. Throws ConfigError for an unknown kind, for chunks that the kind does not have and, when
// training, for what schedule_problem reports.
[[nodiscard]] Schedule build_schedule(const std::string& kind, Pass pass, int stages,
                                      int micro_batches, int chunks);
// Complete, ordered, deadlock-free under rendezvous sends, FIFO per channel. Empty = legal.
[[nodiscard]] std::vector<std::string> check_schedule(const Schedule& schedule);
// Largest number of (micro-batch, chunk) pairs whose activations a pipeline rank holds at once,
// from the forward to the backward, or to the weight half of a split one.
[[nodiscard]] int peak_in_flight(const Schedule& schedule, int pipeline_rank);

// Durations in any one unit; by stage, or one entry for all stages.
struct ScheduleCosts {
  std::vector<double> forward = {1}, backward_input = {1}, backward_weight = {1};
  double transfer = 0;  // from the send to the arrival; a channel carries one at a time
};
struct Span {
  double start = 0, end = 0;
};
struct Timeline {
  std::vector<std::vector<Span>> spans;  // as Schedule::ranks; of a receive: the wait for it
  double makespan = 0;
  // By rank: sum of its computations; the rest of the makespan as a fraction of it; and from its
  // first computation to the end of its last (the time a rank is occupied when steps overlap).
  std::vector<double> busy, bubble, occupied;
};
// Runs the lists in time: sends take no time of the sender, receives wait for the arrival.
// Reductions and steps take none. Throws InternalError for lists that check_schedule refuses
// because they wait for ever.
[[nodiscard]] Timeline simulate_schedule(const Schedule& schedule, const ScheduleCosts& costs);

// One line of text per pipeline rank, e.g. `rank 0 | F0 B0 F1 B1 reduce step`; long lists are
// shortened in the middle.
[[nodiscard]] std::string draw_schedule(const Schedule& schedule, int columns = 96);
// Time from left to right, one row per pipeline rank and one column per unit of time (the shortest
// computation): `F0 F1 .. B0 --`. Too wide drawings continue below, long ones leave out the middle.
[[nodiscard]] std::string draw_timeline(const Schedule& schedule, const Timeline& timeline,
                                        int columns = 120);
// The same as a self-contained SVG file.
[[nodiscard]] std::string draw_timeline_svg(const Schedule& schedule, const Timeline& timeline);

// Splits blocks (embedding, layers, head) into `stages` contiguous parts of at least one block such
// that the most expensive part is as cheap as can be; of such splits the most even one (smallest
// sum of squares), of those the one with the lighter early stages, which hold more in flight.
// Returns the first block of each stage. Throws ConfigError with fewer blocks than stages.
[[nodiscard]] std::vector<int> balance_stages(const std::vector<double>& block_cost, int stages);

}  // namespace capstan::plan
