// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Calls that a rank refuses by itself, groups of one, and the backend without peers.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "capstan/comm/threads.h"
#include "capstan/comm/world.h"
#include "comm/ordered_reduce_internal.h"

namespace capstan::comm {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

template <class Call>
std::string refusal(Call&& call) {
  try {
    call();
  } catch (const InternalError& e) {
    return e.what();
  }
  return "accepted";
}

class Requests : public ::testing::Test {
 protected:
  Communicator world_ = make_fake_communicator(1, 4);
  Tensor four_ = at::ones({4}, at::kFloat), eight_ = at::ones({8}, at::kFloat);
};

TEST_F(Requests, WrongSizes_NameGotAndNeed) {
  EXPECT_THAT(refusal([&] { (void)world_.all_gather(eight_, four_); }),
              AllOf(HasSubstr("all_gather on axis world"), HasSubstr("8 elements in `out`"),
                    HasSubstr("need 16")));
  EXPECT_THAT(refusal([&] { (void)world_.reduce_scatter(four_, eight_); }),
              AllOf(HasSubstr("`in`"), HasSubstr("need 16")));
  EXPECT_THAT(refusal([&] { (void)world_.all_to_all(at::ones({6}), at::ones({6})); }),
              HasSubstr("a multiple of 4 ranks"));
  EXPECT_THAT(refusal([&] { (void)world_.all_to_all(four_, four_); }),
              HasSubstr("the same tensor"));
}

TEST_F(Requests, WrongTensors_AreRefused) {
  EXPECT_THAT(refusal([&] { (void)world_.all_reduce(Tensor()); }), HasSubstr("undefined"));
  EXPECT_THAT(refusal([&] {
                (void)world_.all_reduce(at::ones({4, 4}).t());
              }),
              HasSubstr("contiguous"));
  EXPECT_THAT(refusal([&] { (void)world_.all_gather(at::ones({16}, at::kDouble), four_); }),
              HasSubstr("the same type"));
  EXPECT_THAT(refusal([&] { (void)world_.all_reduce(four_, ReduceOp::kOr); }),
              HasSubstr("reducing with or"));
  EXPECT_THAT(refusal([&] { (void)world_.all_reduce(at::ones({2}, at::kBool)); }),
              HasSubstr("reducing with sum"));
  EXPECT_THAT(refusal([&] { (void)world_.all_reduce(at::ones({2}, at::kComplexFloat)); }),
              HasSubstr("ComplexFloat"));
}

TEST_F(Requests, WrongPeers_AreRefused) {
  EXPECT_THAT(refusal([&] { (void)world_.send(four_, 4); }),
              AllOf(HasSubstr("rank 4"), HasSubstr("0 to 3")));
  EXPECT_THAT(refusal([&] { (void)world_.recv(four_, 1); }), HasSubstr("another rank"));
  EXPECT_THAT(refusal([&] { (void)world_.broadcast(four_, -1); }), HasSubstr("rank -1"));
  EXPECT_THAT(refusal([&] {
                (void)world_.split("tp", {0, 2});
              }),
              HasSubstr("not among the members"));
  EXPECT_THAT(refusal([&] { (void)world_.split("tp", {1, 0}); }), HasSubstr("ascending"));
}

TEST_F(Requests, WrongRowCounts_AreRefused) {
  EXPECT_THAT(refusal([&] {
                (void)world_.all_to_all_v(eight_, four_, {2, 2, 2, 2}, {1, 1, 1});
              }),
              HasSubstr("3 counts for `in`"));
  EXPECT_THAT(refusal([&] {
                (void)world_.all_to_all_v(eight_, four_, {2, 2, 2, 2}, {1, 1, 1, 2});
              }),
              HasSubstr("counts of 5 rows in all for `in`"));
  EXPECT_THAT(refusal([&] {
                (void)world_.all_to_all_v(eight_, four_, {4, 4, 4, -4}, {1, 1, 1, 1});
              }),
              HasSubstr("-4 rows"));
}

TEST_F(Requests, Fake_CountsAndActsAsIfAllRanksHeldTheSame) {
  const Communicator tp = world_.split("tp", {0, 1});
  const Tensor out = at::zeros({2, 4}, at::kFloat);
  tp.all_gather(out, four_).wait();
  EXPECT_EQ(out.sum().item<float>(), 8);
  EXPECT_EQ(tp.ledger().of("tp", "all_gather"), (Traffic{1, 16}));
  EXPECT_EQ(tp.rank(), 1);
  EXPECT_EQ(world_.backend_name(), "fake");
  tp.recv(four_, 0).wait();
  EXPECT_EQ(four_.sum().item<float>(), 0);
}

TEST_F(Requests, GroupOfOne_CopiesAndCountsNothing) {
  const Communicator one;
  const Tensor out = at::zeros({4}, at::kFloat);
  one.all_gather(out, four_).wait();
  EXPECT_EQ(out.sum().item<float>(), 4);
  one.reduce_scatter(out, four_.mul(3)).wait();
  EXPECT_EQ(out.sum().item<float>(), 12);
  one.all_reduce(out).wait();
  one.barrier().wait();
  EXPECT_EQ(out.sum().item<float>(), 12);
  EXPECT_TRUE(one.ledger().table().empty());
  EXPECT_EQ(one.split("tp", {0}).size(), 1);
  EXPECT_FALSE(one.is_aborted());
  one.abort("test");
  EXPECT_TRUE(one.is_aborted());
}

TEST_F(Requests, Timeout_HoldsForAllCommunicatorsOfTheRank) {
  const Communicator tp = world_.split("tp", {0, 1});
  world_.set_timeout(17);
  EXPECT_EQ(tp.timeout(), 17);
  EXPECT_THROW(tp.set_timeout(0), InternalError);
}

TEST(OrderedReduce, HalfPrecision_AccumulatesInFp32AndRoundsOnce) {
  // 1 + 2^-9 + 2^-9 in bf16: rounding at each step would stay at 1.
  const Tensor one = at::ones({1}, at::kBFloat16), small = at::full({1}, 0x1p-8, at::kBFloat16),
               out = at::empty({1}, at::kBFloat16);
  const std::vector<const std::byte*> sources = {static_cast<const std::byte*>(one.data_ptr()),
                                                 static_cast<const std::byte*>(small.data_ptr()),
                                                 static_cast<const std::byte*>(small.data_ptr())};
  reduce_in_rank_order(at::kBFloat16, ReduceOp::kSum, sources,
                       static_cast<std::byte*>(out.data_ptr()), 1);
  EXPECT_EQ(out.item<float>(), 1 + 0x1p-7F);
}

TEST(OrderedReduce, OrderIsTheOneGiven) {
  const Tensor big = at::full({1}, 1e8F, at::kFloat), minus = -big, one = at::ones({1}, at::kFloat),
               out = at::empty({1}, at::kFloat);
  const auto sum = [&](const std::vector<Tensor>& in) {
    std::vector<const std::byte*> sources;
    for (const auto& t : in) sources.push_back(static_cast<const std::byte*>(t.data_ptr()));
    reduce_in_rank_order(at::kFloat, ReduceOp::kSum, sources,
                         static_cast<std::byte*>(out.data_ptr()), 1);
    return out.item<float>();
  };
  EXPECT_EQ(sum({big, one, minus}), 0);
  EXPECT_EQ(sum({big, minus, one}), 1);
}

TEST(OrderedReduce, IntegersWrapWithoutUndefinedBehaviour) {
  const Tensor top = at::full({1}, std::numeric_limits<int64_t>::max(), at::kLong),
               one = at::ones({1}, at::kLong), out = at::empty({1}, at::kLong);
  const std::vector<const std::byte*> sources = {static_cast<const std::byte*>(top.data_ptr()),
                                                 static_cast<const std::byte*>(one.data_ptr())};
  reduce_in_rank_order(at::kLong, ReduceOp::kSum, sources, static_cast<std::byte*>(out.data_ptr()),
                       1);
  EXPECT_EQ(out.item<int64_t>(), std::numeric_limits<int64_t>::min());
}

}  // namespace
}  // namespace capstan::comm
