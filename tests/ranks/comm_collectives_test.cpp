// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The conformance suite: every operation, type and size on every backend against values computed
// here in plain loops.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <map>
#include <mutex>

#include "comm/ordered_reduce_internal.h"
#include "ranks/comm_backends.h"

namespace capstan::test {
namespace {

using at::Tensor;
using comm::Communicator;
using comm::ReduceOp;

constexpr int kRanks = 4;
const std::vector<at::ScalarType> kTypes = {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf,
                                            at::kLong};
const std::vector<int64_t> kSizes = {0, 1, 7, 4099, 70001};

// Values that depend on rank and position and whose sums round: order and width of the accumulator
// show.
Tensor values(int rank, int64_t count, at::ScalarType type) {
  Tensor v = at::arange(count, at::kDouble);
  if (type == at::kLong)
    return (v * 1000003 + rank * 77).to(at::kLong).remainder(100003).sub(50000);
  return (v * 0.37 + rank * 1.7).sin().mul(rank == 2 ? 100.0 : 1.0).to(type);
}

// The sum in rank order, accumulated in fp64, fp32 or int64, rounded once.
Tensor ordered_sum(int64_t count, at::ScalarType type) {
  const bool narrow = type == at::kBFloat16 || type == at::kHalf;
  Tensor sum = values(0, count, type).to(narrow ? at::kFloat : type);
  for (int r = 1; r < kRanks; ++r) sum = sum + values(r, count, type).to(sum.scalar_type());
  return sum.to(type);
}

double unit_roundoff(at::ScalarType type) {
  static const std::map<at::ScalarType, int> bits = {
      {at::kDouble, 53}, {at::kFloat, 24}, {at::kHalf, 11}, {at::kBFloat16, 8}};
  const auto known = bits.find(type);
  return known == bits.end() ? 0 : std::ldexp(1.0, -known->second);
}

bool same_bits(const Tensor& a, const Tensor& b) {
  return a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type() &&
         (a.nbytes() == 0 || std::memcmp(a.data_ptr(), b.data_ptr(), a.nbytes()) == 0);
}

class Collectives : public ::testing::TestWithParam<Kind> {
 protected:
  void on_ranks(const std::function<void(const Communicator&)>& fn) {
    run_on(GetParam(), kRanks, [&](const Communicator& world) { fn(world); });
  }
  // Elements `begin` and later of the sum of `count` values of each rank.
  static bool are_sums(const Tensor& x, int64_t begin, int64_t count) {
    const auto part = [&](const Tensor& all) { return all.narrow(0, begin, x.numel()); };
    if (!is_real_nccl(GetParam())) return same_bits(x, part(ordered_sum(count, x.scalar_type())));
    Tensor sum = at::zeros({count}, at::kDouble), size = sum.clone();
    for (int r = 0; r < kRanks; ++r) {
      const Tensor wide = values(r, count, x.scalar_type()).to(at::kDouble);
      sum.add_(wide);
      size.add_(wide.abs());
    }
    const Tensor bound = part(size) * (2 * kRanks * unit_roundoff(x.scalar_type()));
    return (x.to(at::kDouble) - part(sum)).abs().le(bound).all().item<bool>();
  }
  // Of fp64. Gloo cuts at 16 MiB, a scatter where all parts have 32; threads at a quarter.
  static int64_t count_of_pieces(int64_t gloo_bytes) {
    return (GetParam() == Kind::kGloo ? gloo_bytes : int64_t{1} << 20) /
           static_cast<int64_t>(sizeof(double));
  }
  static void for_all(const std::function<void(int64_t count, at::ScalarType type)>& fn) {
    for (const auto type : kTypes)
      for (const int64_t count : kSizes) {
        SCOPED_TRACE(std::string(c10::toString(type)) + " x " + std::to_string(count));
        fn(count, type);
      }
  }
};

TEST_P(Collectives, AllReduceSum_IsTheSumInRankOrderRoundedOnce) {
  on_ranks([](const Communicator& world) {
    for_all([&](int64_t count, at::ScalarType type) {
      Tensor x = values(world.rank(), count, type);
      world.all_reduce(x).wait();
      EXPECT_TRUE(are_sums(x, 0, count));
    });
  });
}

TEST_P(Collectives, AllReduceMaxMin_KeepNaN) {
  on_ranks([](const Communicator& world) {
    for (const int64_t count : {int64_t{5}, int64_t{70001}}) {
      Tensor x = at::arange(count, at::kFloat).add_(world.rank());
      if (world.rank() == 1) x[3] = std::numeric_limits<float>::quiet_NaN();
      Tensor low = x.clone();
      world.all_reduce(x, ReduceOp::kMax).wait();
      world.all_reduce(low, ReduceOp::kMin).wait();
      EXPECT_EQ(x[2].item<float>(), 5);
      EXPECT_EQ(low[2].item<float>(), 2);
      EXPECT_EQ(x[4].item<float>(), 7);
      if (is_real_nccl(GetParam())) continue;
      EXPECT_TRUE(std::isnan(x[3].item<float>()));
      EXPECT_TRUE(std::isnan(low[3].item<float>()));
    }
  });
}

TEST_P(Collectives, AllReduceOr_CollectsBitsAndFlags) {
  on_ranks([](const Communicator& world) {
    Tensor flag = at::full({1}, world.rank() == 2, at::kBool), unset = at::zeros({1}, at::kBool);
    world.all_reduce(flag, ReduceOp::kOr).wait();
    world.all_reduce(unset, ReduceOp::kOr).wait();
    EXPECT_TRUE(flag.item<bool>());
    EXPECT_FALSE(unset.item<bool>());
    if (!has_bitwise_or(GetParam())) return;
    Tensor bits = at::full({3}, int64_t{1} << world.rank(), at::kLong);
    world.all_reduce(bits, ReduceOp::kOr).wait();
    EXPECT_EQ(bits[1].item<int64_t>(), 15);
  });
}

TEST_P(Collectives, AllReduceLargerThanAPiece_IsStillExact) {
  on_ranks([](const Communicator& world) {
    const int64_t count = count_of_pieces(int64_t{18} << 20) + 3;
    Tensor x = at::arange(count, at::kDouble).add_(world.rank());
    world.all_reduce(x).wait();
    EXPECT_TRUE(same_bits(x, at::arange(count, at::kDouble).mul_(4).add_(6)));
  });
}

TEST_P(Collectives, AllGather_OrdersByRankAndWorksInPlace) {
  on_ranks([](const Communicator& world) {
    for_all([&](int64_t count, at::ScalarType type) {
      const Tensor out = at::empty({kRanks, count}, type),
                   in_place = at::empty({kRanks, count}, type);
      world.all_gather(out, values(world.rank(), count, type)).wait();
      const Tensor mine = in_place[world.rank()];
      mine.copy_(values(world.rank(), count, type));
      world.all_gather(in_place, mine).wait();
      for (int r = 0; r < kRanks; ++r) {
        EXPECT_TRUE(same_bits(out[r], values(r, count, type)));
        EXPECT_TRUE(same_bits(in_place[r], values(r, count, type)));
      }
    });
  });
}

TEST_P(Collectives, ReduceScatter_GivesEachRankItsPartAndWorksInPlace) {
  on_ranks([](const Communicator& world) {
    for_all([&](int64_t count, at::ScalarType type) {
      const Tensor in = values(world.rank(), count * kRanks, type), out = at::empty({count}, type);
      world.reduce_scatter(out, in).wait();
      EXPECT_TRUE(are_sums(out, world.rank() * count, count * kRanks));
      const Tensor mine = in.narrow(0, world.rank() * count, count);
      world.reduce_scatter(mine, in).wait();
      EXPECT_TRUE(are_sums(mine, world.rank() * count, count * kRanks));
    });
  });
}

TEST_P(Collectives, ReduceScatterLargerThanAPiece_IsStillExactInPlace) {
  on_ranks([](const Communicator& world) {
    const int64_t count = count_of_pieces(int64_t{8} << 20) + 5;  // of this rank alone
    const Tensor in = at::arange(count * kRanks, at::kDouble).add_(world.rank());
    const Tensor mine = in.narrow(0, world.rank() * count, count);
    const Tensor expected =
        at::arange(world.rank() * count, (world.rank() + 1) * count, at::kDouble).mul_(4).add_(6);
    world.reduce_scatter(mine, in).wait();
    EXPECT_TRUE(same_bits(mine, expected));
  });
}

TEST_P(Collectives, AllToAll_TransposesParts) {
  on_ranks([](const Communicator& world) {
    for_all([&](int64_t count, at::ScalarType type) {
      const Tensor in = values(world.rank(), count * kRanks, type),
                   out = at::empty({count * kRanks}, type);
      world.all_to_all(out, in).wait();
      for (int r = 0; r < kRanks; ++r)
        EXPECT_TRUE(
            same_bits(out.narrow(0, r * count, count),
                      values(r, count * kRanks, type).narrow(0, world.rank() * count, count)));
    });
  });
}

TEST_P(Collectives, AllToAllV_MovesUnevenRowsAndEmptyOnes) {
  on_ranks([](const Communicator& world) {
    // Rank s sends (s + r) % 3 rows of 5 to rank r; some parts are empty, and in a second round all
    // from rank 0.
    for (const bool silent_zero : {false, true}) {
      const auto rows = [&](int s, int r) -> int64_t {
        return silent_zero && s == 0 ? 0 : (s + r) % 3;
      };
      std::vector<int64_t> in_rows, out_rows;
      std::vector<Tensor> parts, expected;
      for (int r = 0; r < kRanks; ++r) {
        in_rows.push_back(rows(world.rank(), r));
        out_rows.push_back(rows(r, world.rank()));
        parts.push_back(at::full({in_rows.back(), 5}, world.rank() * 10 + r, at::kFloat));
        expected.push_back(at::full({out_rows.back(), 5}, r * 10 + world.rank(), at::kFloat));
      }
      const Tensor in = at::cat(parts), wanted = at::cat(expected), out = at::empty_like(wanted);
      world.all_to_all_v(out, in, out_rows, in_rows).wait();
      EXPECT_TRUE(same_bits(out, wanted));
    }
  });
}

TEST_P(Collectives, Broadcast_CopiesTheRoot) {
  on_ranks([](const Communicator& world) {
    for_all([&](int64_t count, at::ScalarType type) {
      for (const int root : {0, 3}) {
        Tensor x = values(world.rank(), count, type);
        world.broadcast(x, root).wait();
        EXPECT_TRUE(same_bits(x, values(root, count, type)));
      }
    });
  });
}

TEST_P(Collectives, SendRecv_KeepOrderPerPair) {
  on_ranks([](const Communicator& world) {
    const int next = (world.rank() + 1) % kRanks, previous = (world.rank() + kRanks - 1) % kRanks;
    for (const int64_t count : kSizes) {
      std::vector<comm::Work> works;
      std::vector<Tensor> sent, got;
      for (int i = 0; i < 3; ++i) {
        sent.push_back(values(world.rank() + 10 * i, count, at::kFloat));
        got.push_back(at::empty({count}, at::kFloat));
        works.push_back(world.send(sent.back(), next));
        works.push_back(world.recv(got.back(), previous));
      }
      for (auto& work : works) work.wait();
      for (int i = 0; i < 3; ++i)
        EXPECT_TRUE(
            same_bits(got[static_cast<size_t>(i)], values(previous + 10 * i, count, at::kFloat)));
    }
  });
}

TEST_P(Collectives, ZeroDimTensors_AreOneElement) {
  on_ranks([](const Communicator& world) {
    Tensor x = at::scalar_tensor(world.rank() + 1.0, at::kDouble);
    world.all_reduce(x).wait();
    EXPECT_EQ(x.item<double>(), 10);
    EXPECT_EQ(x.dim(), 0);
  });
}

TEST_P(Collectives, TensorsThatRequireGrad_AreTreatedAsMemory) {
  on_ranks([](const Communicator& world) {
    Tensor x = at::ones({4}, at::kFloat);
    x.requires_grad_(true);
    world.all_reduce(x).wait();
    EXPECT_EQ(x.sum().item<float>(), 16);
  });
}

TEST_P(Collectives, Split_MakesTheGroupsInOrder) {
  on_ranks([](const Communicator& world) {
    const std::vector<int> half = world.rank() < 2 ? std::vector{0, 1} : std::vector{2, 3};
    const std::vector<int> cross = world.rank() % 2 == 0 ? std::vector{0, 2} : std::vector{1, 3};
    const Communicator tp = world.split("tp", half), dp = world.split("dp", cross);
    const Communicator alone = world.split("pp", {world.rank()});
    EXPECT_EQ(tp.ranks(), half);
    EXPECT_EQ(dp.rank(), world.rank() / 2);
    EXPECT_EQ(dp.axis(), "dp");
    EXPECT_EQ(dp.world_rank(), world.rank());
    EXPECT_EQ(alone.size(), 1);
    EXPECT_EQ(alone.world_rank(), world.rank());
    Tensor x = at::full({3}, world.rank(), at::kFloat), y = x.clone(), z = x.clone();
    tp.all_reduce(x).wait();
    dp.all_reduce(y).wait();
    alone.all_reduce(z).wait();
    EXPECT_EQ(x[0].item<float>(), world.rank() < 2 ? 1 : 5);
    EXPECT_EQ(y[0].item<float>(), world.rank() % 2 == 0 ? 2 : 4);
    EXPECT_EQ(z[0].item<float>(), world.rank());
    // A subgroup of a subgroup.
    const Communicator again = tp.split("inner", {0, 1});
    again.all_reduce(x).wait();
    EXPECT_EQ(x[0].item<float>(), world.rank() < 2 ? 2 : 10);
  });
}

TEST_P(Collectives, Ledger_CountsCallsAndBytesPerAxisExactly) {
  on_ranks([](const Communicator& world) {
    const std::vector<int> half = world.rank() < 2 ? std::vector{0, 1} : std::vector{2, 3};
    const Communicator tp = world.split("tp", half);
    world.ledger().reset();
    const Tensor x = at::zeros({100}, at::kFloat), all = at::zeros({200}, at::kFloat);
    for (int i = 0; i < 3; ++i) tp.all_reduce(x).wait();
    tp.all_gather(all, x).wait();
    tp.reduce_scatter(x, all).wait();
    world.barrier().wait();
    world.control().all_reduce(at::zeros({1}, at::kLong)).wait();
    auto work = tp.rank() == 0 ? tp.send(x, 1) : tp.recv(x, 0);
    work.wait();
    const comm::Ledger::Table expected = {
        {"tp/all_reduce", {3, 1200}},    {"tp/all_gather", {1, 400}},
        {"tp/reduce_scatter", {1, 800}}, {"world/barrier", {1, 0}},
        {"control/all_reduce", {1, 8}},  {tp.rank() == 0 ? "tp/send" : "tp/recv", {1, 400}}};
    EXPECT_EQ(world.ledger().table(), expected);
    EXPECT_EQ(world.ledger().total(), (comm::Traffic{7, 2800}));
  });
}

INSTANTIATE_TEST_SUITE_P(Backends, Collectives,
                         ::testing::Values(Kind::kThreads, Kind::kGloo, Kind::kNccl),
                         [](const auto& parameter) { return name_of(parameter.param); });

INSTANTIATE_TEST_SUITE_P(DISABLED_Rank, Collectives, ::testing::Values(Kind::kProcess),
                         [](const auto& parameter) { return name_of(parameter.param); });

// Reduce-scatter followed by all-gather is all-reduce, on both backends and in every repetition:
// the same bits.
TEST(Determinism, RepeatedRunsAndBackends_GiveTheSameBits) {
  const auto run = [](Kind kind) {
    Tensor result;
    run_on(kind, kRanks, [&](const Communicator& world) {
      std::vector<Tensor> parts;
      for (const auto type : {at::kFloat, at::kBFloat16, at::kHalf}) {
        const int64_t count = 40004;
        Tensor x = values(world.rank(), count, type), in = x.clone();
        world.all_reduce(x).wait();
        const Tensor part = at::empty({count / kRanks}, type), whole = at::empty({count}, type);
        world.reduce_scatter(part, in).wait();
        world.all_gather(whole, part).wait();
        EXPECT_TRUE(same_bits(x, whole));
        parts.push_back(x.view(at::kByte));
      }
      if (world.rank() == 3) result = at::cat(parts);
    });
    return result;
  };
  const Tensor first = run(Kind::kThreads);
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(same_bits(run(Kind::kThreads), first));
  for (int i = 0; i < 2; ++i) EXPECT_TRUE(same_bits(run(Kind::kGloo), first));
  EXPECT_TRUE(same_bits(run(Kind::kNccl), first));
}

}  // namespace
}  // namespace capstan::test
