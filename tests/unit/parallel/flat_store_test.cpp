// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/parallel/flat_store.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <array>

#include "capstan/base/error.h"
#include "capstan/param/init.h"
#include "small_model.h"

namespace capstan::parallel {
namespace {

using param::GradSlot;
using param::Param;
using param::When;
using testing::index_of;
using testing::SmallModel;

const std::string kLayer = "model.layers.0.";

std::string message_of(const std::function<void()>& fn) {
  try {
    fn();
  } catch (const InternalError& e) {
    return e.what();
  }
  return "nothing was thrown";
}

const SmallModel& small_model() {
  static const SmallModel model;
  return model;
}

double padding_sum(const FlatStore& store, const Tensor& flat) {
  Tensor rest = flat.to(at::kDouble).abs();
  for (const auto& range : store.shard().ranges)
    rest.narrow(0, range.begin, range.end - range.begin).zero_();
  return rest.sum().item<double>();
}

TEST(FlatStore, Initialize_GivesTheInitialValuesAndZeroPadding) {
  auto store = small_model().store(1);
  store->initialize(7, "policy");
  store->open();
  for (int i = 0; i < static_cast<int>(store->layout().params.size()); ++i) {
    const auto& spec = store->spec(i);
    const Tensor expected =
        param::init_values(spec, plan::whole_box(spec.shape), 7, "policy", at::kDouble);
    EXPECT_TRUE(store->value(i).equal(expected)) << spec.name;
  }
  EXPECT_EQ(padding_sum(*store, store->shard().master), 0);
  EXPECT_GT(store->layout().numel, 4 * 256);  // there is padding to look at
}

TEST(FlatStore, Ranges_CoverEveryElementOnceWithItsDecay) {
  const auto store = small_model().store(1);
  int64_t decayed = 0, plain = 0;
  for (const auto& range : store->shard().ranges)
    (range.decay ? decayed : plain) += range.end - range.begin;
  EXPECT_EQ(plain, 2 * 12);  // the norms
  EXPECT_EQ(decayed, 12 * 12 + 2 * 6 * 12 + 12 * 12 + 3 * 20 * 12);
}

TEST(FlatStore, FusedParameters_AreOneView) {
  const auto store = small_model().store(1);
  store->initialize(7, "policy");
  store->open();
  const std::array indices{index_of(*store, kLayer + "self_attn.q_proj.weight"),
                           index_of(*store, kLayer + "self_attn.k_proj.weight"),
                           index_of(*store, kLayer + "self_attn.v_proj.weight")};
  const Tensor joined = store->joined_value(indices);
  EXPECT_EQ(joined.sizes(), (at::IntArrayRef{24, 12}));
  EXPECT_EQ(joined.data_ptr(), store->value(indices[0]).data_ptr());
  EXPECT_TRUE(joined.narrow(0, 18, 6).equal(store->value(indices[2])));
}

TEST(FlatStore, ApartParameters_AreJoinedByCopyAndScattered) {
  const auto store = small_model().store(1);
  store->initialize(7, "policy");
  store->open();
  const std::array indices{index_of(*store, kLayer + "mlp.up_proj.weight"),
                           index_of(*store, kLayer + "self_attn.q_proj.weight")};
  EXPECT_TRUE(store->joined_value(indices).narrow(0, 20, 12).equal(store->value(indices[1])));
  store->begin_step();
  for (int pass = 1; pass <= 2; ++pass)
    store->accumulate_joined(
        indices,
        [](GradSlot& slot) {
          EXPECT_TRUE(slot.overwrite);
          slot.buffer.copy_(at::arange(32 * 12, at::kDouble).view({32, 12}));
        },
        When::kNow);
  store->accumulate(
      indices[1], [](GradSlot& slot) { EXPECT_EQ(slot.buffer[0][0].item<double>(), 2 * 240); },
      When::kNow);
}

TEST(FlatStore, FirstWriteOfAStep_Overwrites) {
  const auto store = small_model().store(1);
  const Param p(store.get(), index_of(*store, kLayer + "mlp.down_proj.weight"));
  std::vector<bool> flags;
  for (int step = 0; step < 2; ++step) {
    store->begin_step();
    for (int pass = 0; pass < 2; ++pass)
      p.accumulate([&](GradSlot& slot) {
        flags.push_back(slot.overwrite);
        param::add_to_slot(slot, at::ones({12, 20}, at::kDouble));
      });
    EXPECT_EQ(store->shard().gradient.sum().item<double>(), 2 * 240);
    (void)store->take_gradient(true);
  }
  EXPECT_EQ(flags, (std::vector<bool>{true, false, true, false}));
}

TEST(FlatStore, JoinedWriteAfterOnePart_AddsToThatPartOnly) {
  const auto store = small_model().store(1);
  const std::array indices{index_of(*store, kLayer + "mlp.gate_proj.weight"),
                           index_of(*store, kLayer + "mlp.up_proj.weight")};
  // Leaves numbers of an earlier step behind.
  store->begin_step();
  store->accumulate_joined(
      indices, [](GradSlot& s) { s.buffer.fill_(99); }, When::kNow);
  (void)store->take_gradient(true);
  store->begin_step();
  store->accumulate(
      indices[0], [](GradSlot& s) { s.buffer.fill_(5); }, When::kNow);
  store->accumulate_joined(
      indices,
      [](GradSlot& slot) {
        EXPECT_FALSE(slot.overwrite);
        EXPECT_EQ(slot.buffer.sizes(), (at::IntArrayRef{40, 12}));
        slot.buffer.add_(1);
      },
      When::kNow);
  (void)store->take_gradient(true);
  EXPECT_EQ(store->shard().gradient.sum().item<double>(), 240 * 6 + 240 * 1);
}

TEST(FlatStore, UntouchedParameters_FinishWithZeroGradient) {
  const auto store = small_model().store(1);
  const int down = index_of(*store, kLayer + "mlp.down_proj.weight");
  store->begin_step();
  store->accumulate(
      down, [](GradSlot& s) { s.buffer.fill_(3); }, When::kNow);
  (void)store->take_gradient(true);
  store->begin_step();
  (void)store->take_gradient(true);
  EXPECT_EQ(store->shard().gradient.abs().sum().item<double>(), 0);
}

TEST(FlatStore, GradientAfterReduction_NamesTheParameter) {
  const auto store = small_model().store(1);
  const int down = index_of(*store, kLayer + "mlp.down_proj.weight");
  store->begin_step();
  (void)store->take_gradient(true);
  const auto late = [&] {
    store->accumulate(
        down, [](GradSlot&) {}, When::kNow);
  };
  EXPECT_NE(message_of(late).find("down_proj.weight added after its bucket was reduced"),
            std::string::npos)
      << message_of(late);
}

TEST(FlatStore, FrozenBlock_HasNoGradientAndTakesNone) {
  const SmallModel model({1});
  const auto store = model.store(1);
  store->begin_step();
  const Param p(store.get(), 0);
  EXPECT_FALSE(p.trainable());
  EXPECT_FALSE(p.anchor().requires_grad());
  EXPECT_FALSE(store->shard().gradient.defined());
  p.accumulate([](GradSlot&) { FAIL() << "a frozen parameter was asked for its gradient"; });
  EXPECT_NE(message_of([&] {
              store->accumulate(
                  0, [](GradSlot&) {}, When::kNow);
            }).find("frozen"),
            std::string::npos);
}

TEST(FlatStore, ClosedBlock_RefusesReads) {
  const auto store = small_model().store(1);
  EXPECT_NE(message_of([&] { (void)store->value(0); }).find("block is closed"), std::string::npos);
  store->open();
  store->open();
  store->close();
  EXPECT_NO_THROW((void)store->value(0));
  store->close();
  EXPECT_THROW((void)store->value(0), InternalError);
  EXPECT_THROW(store->close(), InternalError);
}

TEST(FlatStore, NarrowCompute_ReadsTheRoundedMaster) {
  SmallModel model;
  model.types = {at::kBFloat16, at::kFloat, at::kFloat};
  const auto store = model.store(2);
  store->initialize(3, "policy");
  const auto shard = store->shard();
  EXPECT_TRUE(shard.copy.equal(shard.master.to(at::kBFloat16)));
  store->open();
  EXPECT_EQ(store->value(0).scalar_type(), at::kBFloat16);
  const uint64_t version = store->version();
  shard.master.add_(1);
  store->refresh();
  EXPECT_TRUE(shard.copy.equal(shard.master.to(at::kBFloat16)));
  EXPECT_NE(store->version(), version);
}

TEST(FlatStore, EqualTypes_ShareOneStorage) {
  const auto store = small_model().store(1);
  EXPECT_FALSE(store->shard().copy.defined());
  store->open();
  EXPECT_EQ(store->value(0).data_ptr(), store->shard().master.data_ptr());
}

}  // namespace
}  // namespace capstan::parallel
