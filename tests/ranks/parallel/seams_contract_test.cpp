// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What the seams promise besides the numbers: refusals, traffic, repeatability, other precisions.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "capstan/base/error.h"
#include "capstan/comm/threads.h"
#include "capstan/parallel/context_split.h"
#include "ranks/parallel/seams_case.h"
#include "support/gradient_check.h"
#include "support/run_ranks.h"

namespace capstan::test {
namespace {

using at::Tensor;
using ::testing::HasSubstr;

std::string failure_of(const SeamsCase& c) {
  try {
    run_ranks_of(c, [](SeamsRank& rank, int) { (void)rank.train(); });
  } catch (const comm::RankError& error) {
    return error.what();
  }
  return "no failure";
}

TEST(SeamsContract, LengthsThatDoNotDivideAreRefused) {
  SeamsCase c{.tp = 4, .sequence = true};
  c.tokens = 30;
  EXPECT_THAT(failure_of(c), HasSubstr("30 tokens of a row do not divide over 4 ranks"));
  c = {.cp = 4};
  c.tokens = 36;
  EXPECT_THAT(failure_of(c), HasSubstr("does not divide into 8 chunks for 4 context ranks"));
}

TEST(SeamsContract, HeadsThatDoNotDivideAreRefused) {
  SeamsCase c{.cp = 4, .all_to_all = true};
  c.heads = 6;
  EXPECT_THAT(failure_of(c), HasSubstr("query heads must divide by the ranks"));
}

TEST(SeamsContract, SequenceParallelNeedsATensorAxis) {
  EXPECT_THROW(parallel::ParallelSeams({.tensor = {}, .context = {}, .sequence_parallel = true}),
               InternalError);
}

// The rows' places must be those that the masks are computed for.
TEST(SeamsContract, OtherPartsOfTheRowAreRefused) {
  const auto attempt = [](const std::function<void(param::RowMap&)>& spoil) {
    try {
      run_ranks(2, [&](comm::Communicator world) {
        parallel::ParallelSeams seams({.tensor = {}, .context = world});
        param::RowMap rows;
        rows.row_index_T = parallel::context_row_index(16, 2, world.rank());
        rows.row_length = 16;
        rows.positions_BT = rows.row_index_T.unsqueeze(0);
        rows.positions_are_rows = false;
        spoil(rows);
        param::Context context;
        context.rows = &rows;
        const nn::AttentionInput input{
            .query_heads = 2, .key_value_heads = 1, .head_size = 4, .max_positions = 16};
        (void)seams.attend(context, 0, at::ones({1, 8, 16}, at::kDouble), input);
      });
    } catch (const comm::RankError& error) {
      return std::string(error.what());
    }
    return std::string("no failure");
  };
  EXPECT_EQ(attempt([](param::RowMap&) {}), "no failure");
  EXPECT_THAT(attempt([](param::RowMap& r) { r.row_index_T = at::arange(8, at::kLong); }),
              HasSubstr("(zig-zag)"));
  EXPECT_THAT(attempt([](param::RowMap& r) { r.row_index_T = Tensor(); }),
              HasSubstr("without their places in the row"));
  EXPECT_THAT(attempt([](param::RowMap& r) { r.row_length = 8; }), HasSubstr("rows of 8 tokens"));
  EXPECT_THAT(attempt([](param::RowMap& r) { r.positions_are_rows = true; }),
              HasSubstr("needs the positions of its tokens"));
}

// Calls and bytes of one rank in one training pass.
comm::Ledger::Table traffic_of(const SeamsCase& c) {
  comm::Ledger::Table table;
  run_ranks(c.ranks(), [&](comm::Communicator world) {
    SeamsRank rank(c, world);
    world.ledger().reset();
    (void)rank.train();
    if (world.rank() == 0) table = world.ledger().table();
  });
  return table;
}

constexpr int64_t kLayers = 2, kHidden = 16, kBytes = 8;

TEST(SeamsContract, TrafficOfTensorParallel) {
  const SeamsCase c{.tp = 2};
  const int64_t tokens = c.samples * c.tokens, stream = tokens * kHidden * kBytes;
  // Per layer: row forward and column backward of attention and MLP. Embedding: forward. Head: the
  // input gradient, and per chunk of tokens (one here) largest logits, then sums and targets.
  const comm::Ledger::Table want{
      {"tp/all_reduce", {4 * kLayers + 4, (4 * kLayers + 2) * stream + 3 * tokens * kBytes}}};
  EXPECT_EQ(traffic_of(c), want);
}

TEST(SeamsContract, TrafficOfSequenceParallel) {
  const SeamsCase c{.tp = 2, .sequence = true};
  const int64_t tokens = c.samples * c.tokens, stream = tokens * kHidden * kBytes;
  // Gathers, of the shard: column forward and weight gradient, row backward, twice per layer;
  // embedding backward; head forward. Reduce-scatters, of the whole: the transposes without that of
  // the weight gradient.
  const int64_t gathers = 6 * kLayers + 2, reduces = 4 * kLayers + 2;
  const comm::Ledger::Table want{{"tp/all_gather", {gathers, gathers * stream / 2}},
                                 {"tp/all_reduce", {2, 3 * tokens * kBytes}},
                                 {"tp/reduce_scatter", {reduces, reduces * stream}}};
  EXPECT_EQ(traffic_of(c), want);
}

TEST(SeamsContract, TrafficOfChunkedSequenceParallel) {
  const SeamsCase c{.tp = 4, .sequence = true, .overlap = true};
  const int64_t tokens = c.samples * c.tokens, stream = tokens * kHidden * kBytes;
  // Five ways round per column and row pair (forward, forward, input and weight gradient of the
  // column, input gradient of the row), each of three hops; embedding and head as before.
  const int64_t hops = 5 * 2 * kLayers * 3;
  const comm::Ledger::Table want{{"tp/all_gather", {2, 2 * stream / 4}},
                                 {"tp/all_reduce", {2, 3 * tokens * kBytes}},
                                 {"tp/recv", {hops, hops * stream / 4}},
                                 {"tp/reduce_scatter", {2, 2 * stream}},
                                 {"tp/send", {hops, hops * stream / 4}}};
  EXPECT_EQ(traffic_of(c), want);
}

TEST(SeamsContract, TrafficOfTheRing) {
  for (const int n : {2, 4}) {
    const SeamsCase c{.cp = n, .documents = true};
    const int64_t kv = c.samples * c.tokens / n * 2 * c.key_value_heads * 4 * kBytes;
    // Keys and values: n-1 hops forward, n-1 backward; their gradients: n hops, home.
    const int64_t hops = kLayers * (3 * n - 2);
    const comm::Ledger::Table want{{"cp/recv", {hops, hops * kv}}, {"cp/send", {hops, hops * kv}}};
    EXPECT_EQ(traffic_of(c), want);
  }
}

TEST(SeamsContract, TrafficOfAllToAll) {
  for (const int n : {2, 4}) {
    const SeamsCase c{.cp = n, .all_to_all = true};
    const int64_t head = c.samples * c.tokens / n * 4 * kBytes;
    const int64_t copies = std::max<int64_t>(c.key_value_heads, n);  // of key (and value) heads
    const comm::Ledger::Table want{
        {"cp/all_to_all", {4 * kLayers, kLayers * 2 * head * ((c.heads + 2 * copies) + c.heads)}}};
    EXPECT_EQ(traffic_of(c), want);
  }
}

// Two projections of one input, which is gathered once for both, forward and weight gradient alike.
struct Pair {
  Tensor q, gate, dx;
};
Pair run_pair(SeamsRank& rank, const Tensor& x) {
  const std::string layer = "model.layers.0.";
  const nn::Projection q{{rank.store().find(layer + "self_attn.q_proj.weight")}, {}};
  const nn::Projection gate{{rank.store().find(layer + "mlp.gate_proj.weight")}, {}};
  const std::vector<nn::Projection> both{q, gate};
  const Tensor leaf = rank.part(x, true).requires_grad_(true);
  const auto y = rank.seams().column(rank.context(param::Mode::kTrain), leaf, both);
  torch::autograd::backward({y[0].sin().sum(), y[1].cos().sum()}, {});
  rank.store().run_deferred();
  return {y[0].detach(), y[1].detach(), leaf.grad()};
}

TEST(SeamsContract, ProjectionsShareOneGather) {
  for (const bool overlap : {false, true})
    for (const bool deferred : {false, true}) {
      SeamsCase c{.tp = 2, .sequence = true, .overlap = overlap, .deferred = deferred};
      const Tensor x = testing::normal({c.samples, c.tokens, kHidden}, 3);
      SeamsRank reference(c, {});
      const Pair want = run_pair(reference, x);
      run_ranks(c.ranks(), [&](comm::Communicator world) {
        SeamsRank rank(c, world);
        world.ledger().reset();
        const Pair got = run_pair(rank, x);
        EXPECT_EQ(world.ledger().of("tp", overlap ? "send" : "all_gather").calls, overlap ? 3 : 2);
        const int64_t r = world.rank(), q = want.q.size(2) / 2, gate = want.gate.size(2) / 2;
        EXPECT_LE(error_of(got.q, want.q.narrow(2, r * q, q)), 1e-12);
        EXPECT_LE(error_of(got.gate, want.gate.narrow(2, r * gate, gate)), 1e-12);
        EXPECT_LE(error_of(got.dx, rank.part(want.dx, true)), 1e-12);
        for (const char* name : {"self_attn.q_proj.weight", "mlp.gate_proj.weight"}) {
          const auto index = [&](SeamsRank& of) {
            return static_cast<size_t>(
                of.store().find("model.layers.0." + std::string(name)).index());
          };
          const Tensor whole = reference.store().gradient(index(reference));
          const int64_t rows = whole.size(0) / 2;
          EXPECT_LE(error_of(rank.store().gradient(index(rank)), whole.narrow(0, r * rows, rows)),
                    1e-12);
        }
      });
    }
}

// A column and a row layer with GELU between them, whose backward goes from the one's sum over
// ranks to the sum before GELU.
struct Mlp {
  Tensor y, dx, dgate, ddown;
};
Mlp run_mlp(SeamsRank& rank, const Tensor& x, ops::GeluForm form) {
  const auto find = [&rank](const char* name) {
    return rank.store().find("model.layers.0.mlp." + std::string(name) + "_proj.weight");
  };
  const nn::Projection gate{{find("gate")}, {}}, down{{find("down")}, {}};
  const Tensor leaf = rank.part(x, true).requires_grad_(true);
  const param::Context context = rank.context(param::Mode::kTrain);
  const Tensor y =
      rank.seams().row(context, rank.seams().column_gelu(context, leaf, gate, form), down);
  torch::autograd::backward({y.sin().sum()}, {});
  rank.store().run_deferred();
  const auto gradient = [&rank](const nn::Projection& of) {
    return rank.store().gradient(static_cast<size_t>(of.parts[0].index()));
  };
  return {y.detach(), leaf.grad(), gradient(gate), gradient(down)};
}

TEST(SeamsContract, GeluBetweenColumnAndRow) {
  for (const ops::GeluForm form : {ops::GeluForm::kTanh, ops::GeluForm::kErf})
    for (const auto& [sequence, overlap, deferred] :
         {std::tuple{false, false, false}, {true, false, true}, {true, true, false}}) {
      SeamsCase c{.tp = 2, .sequence = sequence, .overlap = overlap, .deferred = deferred};
      const Tensor x = testing::normal({c.samples, c.tokens, kHidden}, 3);
      SeamsRank reference(c, {});
      const Mlp want = run_mlp(reference, x, form);
      run_ranks(c.ranks(), [&, overlaps = overlap](const comm::Communicator& world) {
        SeamsRank rank(c, world);
        const Mlp got = run_mlp(rank, x, form);
        const int64_t r = world.rank(), features = want.dgate.size(0) / 2;
        EXPECT_LE(error_of(got.y, rank.part(want.y, true)), 1e-12);
        EXPECT_LE(error_of(got.dx, rank.part(want.dx, true)), 1e-12) << overlaps;
        EXPECT_LE(error_of(got.dgate, want.dgate.narrow(0, r * features, features)), 1e-12);
        EXPECT_LE(error_of(got.ddown, want.ddown.narrow(1, r * features, features)), 1e-12);
      });
    }
}

// Sends and receives between the same ranks, collectives of two axes, all over sockets.
TEST(SeamsContract, GlooGivesTheSameNumbers) {
  for (const bool all_to_all : {false, true})
    for (const bool overlap : {false, true}) {
      SeamsCase c{.tp = 2, .cp = 2, .sequence = true, .all_to_all = all_to_all, .overlap = overlap};
      c.gloo = true;
      c.documents = true;
      c.deferred = overlap;
      expect_equal_to_one_rank(c);
    }
  SeamsCase c{.cp = 4, .gloo = true};
  expect_equal_to_one_rank(c);
}

std::vector<SeamsRank::Named> results_of(const SeamsCase& c) {
  std::vector<SeamsRank::Named> all(static_cast<size_t>(c.ranks()));
  run_ranks_of(c, [&](SeamsRank& rank, int index) {
    auto& mine = all[static_cast<size_t>(index)];
    mine = rank.train();
    for (size_t i = 0; i < rank.store().size(); ++i)
      mine.emplace_back("gradient", rank.store().gradient(i));
  });
  return all;
}

TEST(SeamsContract, RepeatedRunsGiveTheSameBits) {
  for (const bool all_to_all : {false, true}) {
    SeamsCase c{.tp = 2, .cp = 2, .sequence = true, .all_to_all = all_to_all, .documents = true};
    c.dtype = at::kFloat;
    const auto once = results_of(c), again = results_of(c);
    for (size_t rank = 0; rank < once.size(); ++rank)
      for (size_t i = 0; i < once[rank].size(); ++i)
        EXPECT_TRUE(at::equal(once[rank][i].second, again[rank][i].second)) << once[rank][i].first;
  }
}

TEST(SeamsContract, OtherPrecisions) {
  for (const bool all_to_all : {false, true}) {
    SeamsCase c{.tp = 2, .cp = 2, .sequence = true, .all_to_all = all_to_all, .documents = true};
    c.dtype = at::kFloat;
    c.tolerance = 2e-5;
    expect_equal_to_one_rank(c);
    for (const auto dtype : {at::kBFloat16, at::kHalf}) {
      c.dtype = dtype;
      c.overlap = false;
      c.tolerance = dtype == at::kHalf ? 0.02 : 0.08;  // about ten times the rounding
      expect_equal_to_one_rank(c);
      c.overlap = true;
      expect_equal_to_one_rank(c);
    }
  }
}

}  // namespace
}  // namespace capstan::test
