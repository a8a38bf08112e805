// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Orders of experts whose counts stay on the device, against those that the host makes, by our
// kernels. Legend: N tokens, k choices of a token, E experts, R rows, D features.
#include <gtest/gtest.h>

#include <algorithm>

#include "capstan/device/accelerator.h"
#include "capstan/ops/device_kernels.h"
#include "capstan/ops/permute.h"
#include "unit/ops/gpu_kernels.h"
#include "unit/ops/one_param.h"

namespace capstan::ops {
namespace {

using testing::normal;

constexpr int64_t kTokens = 40, kChoices = 2, kExperts = 5, kWidth = 16;

class GpuExperts : public ::testing::TestWithParam<bool> {
 public:
  void SetUp() override { install_device_kernels(test::gpu_kernels()); }
  void TearDown() override { install_device_kernels(before_); }

 private:
  const kernels::Api* before_ = device_kernels();
};

Tensor on_device(const Tensor& x) { return x.defined() ? x.to(device::run_device()) : x; }
Tensor bf16(at::IntArrayRef sizes, uint64_t seed) { return normal(sizes, seed, at::kBFloat16); }

// Nobody chooses expert 3.
Tensor choices() {
  const Tensor token_N1 = at::arange(kTokens, at::kLong).unsqueeze(1);
  const Tensor first_N1 = token_N1.remainder(3), second_N1 = token_N1.remainder(2).mul(-2).add(4);
  return at::cat({first_N1, at::where(second_N1.eq(first_N1), 1, second_N1)}, 1);
}
Tensor kept() { return normal({kTokens, kChoices}, 9).gt(-0.5); }

struct Orders {
  Tensor chosen_Nk = choices();
  ExpertOrder host, device;
  explicit Orders(bool drops) {
    const Tensor keep_Nk = drops ? kept() : Tensor();
    host = order_by_expert(chosen_Nk, keep_Nk, kExperts);
    device = order_by_expert(on_device(chosen_Nk), on_device(keep_Nk), kExperts, true);
  }
  [[nodiscard]] int64_t most() const {
    return *std::max_element(host.counts_E.begin(), host.counts_E.end());
  }
};

TEST_P(GpuExperts, OrdersAreThoseOfTheHost) {
  const Orders o(GetParam());
  const int64_t rows = o.host.slot_R.numel();
  EXPECT_EQ(rows < kTokens * kChoices, GetParam());
  EXPECT_TRUE(o.device.counts_E.empty());
  EXPECT_EQ(o.device.slot_R.numel(), kTokens * kChoices);
  EXPECT_TRUE(o.device.place_Nk.cpu().equal(o.host.place_Nk));
  EXPECT_TRUE(o.device.slot_R.narrow(0, 0, rows).cpu().equal(o.host.slot_R));
  const Tensor ends_E = at::tensor(o.host.counts_E, at::kLong).cumsum(0).to(at::kInt);
  EXPECT_TRUE(o.device.ends_E.cpu().equal(ends_E));
  const Tensor x = bf16({kTokens, kWidth}, 1);
  EXPECT_TRUE(permute_tokens(on_device(x), o.device)
                  .narrow(0, 0, rows)
                  .cpu()
                  .equal(permute_tokens(x, o.host)));
}

// The host's rows [R, D] where an order with room has them, zero elsewhere.
Tensor spread(const Orders& o, const Tensor& rows_RD, int64_t room) {
  Tensor all_ERD = at::zeros({kExperts, room, kWidth}, rows_RD.options());
  int64_t first = 0;
  for (int64_t e = 0; e < kExperts; ++e) {
    const int64_t count = o.host.counts_E[static_cast<size_t>(e)];
    all_ERD[e].narrow(0, 0, count).copy_(rows_RD.narrow(0, first, count));
    first += count;
  }
  return all_ERD.view({-1, kWidth});
}

TEST_P(GpuExperts, RoomIsFilledWithZeros) {
  const Orders o(GetParam());
  for (const int64_t room : {o.most(), o.most() + 3}) {
    const ExpertOrder order = with_room(o.device, on_device(o.chosen_Nk), room);
    EXPECT_TRUE(order.ends_E.cpu().equal(at::arange(1, kExperts + 1, at::kInt) * room));
    const Tensor x = bf16({kTokens, kWidth}, 1), grad = bf16({kTokens, kWidth}, 2);
    const Tensor weights = leaf(normal({kTokens, kChoices}, 3, at::kFloat));
    const Tensor y = leaf(permute_tokens(x, o.host)), y_device = leaf(spread(o, y, room));
    EXPECT_TRUE(permute_tokens(on_device(x), order).cpu().equal(y_device.detach()));
    const Tensor rows = leaf(on_device(y_device)), w = leaf(on_device(weights));
    const Tensor sum = combine_rows(rows, w, order), want = combine_rows(y, weights, o.host);
    EXPECT_TRUE(testing::near(sum.detach().cpu(), want.detach()));
    run_backward(sum, on_device(grad));
    run_backward(want, grad);
    EXPECT_TRUE(testing::near(rows.grad().cpu(), spread(o, y.grad(), room)));
    EXPECT_TRUE(testing::near(w.grad().cpu(), weights.grad()));
  }
}

INSTANTIATE_TEST_SUITE_P(Drops, GpuExperts, ::testing::Bool(),
                         [](const auto& one) { return one.param ? "Some" : "None"; });

}  // namespace
}  // namespace capstan::ops
