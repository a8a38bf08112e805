// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "kernels/array.h"

namespace capstan::kernels::test {
namespace {

struct Order {
  Values place, slot, counts;
};
Order order_of(const Values& chosen, const Values& keep, size_t experts) {
  Order o{Values(chosen.size(), -1.0), {}, Values(experts)};
  for (size_t e = 0; e < experts; ++e)
    for (size_t s = 0; s < chosen.size(); ++s) {
      if (static_cast<size_t>(chosen[s]) != e || (!keep.empty() && keep[s] == 0)) continue;
      o.place[s] = static_cast<double>(o.slot.size());
      o.slot.push_back(static_cast<double>(s));
      ++o.counts[e];
    }
  return o;
}

void check_order(size_t slots, size_t experts, bool has_keep) {
  SCOPED_TRACE(testing::Message() << slots << " slots, " << experts << " experts");
  const Values chosen = random_ids(slots, 1, static_cast<int64_t>(experts));
  const Values keep = has_keep ? random_ids(slots, 2, 2) : Values{};
  const Array c(DType::kInt64, chosen), k(DType::kUint8, keep);
  const Order expected = order_of(chosen, keep, experts);
  const auto out = same_bits([&] {
    std::vector<Array> y;
    y.push_back(Array::of_size(DType::kInt64, slots));
    y.push_back(Array::of_size(DType::kInt64, expected.slot.size()));
    y.push_back(Array::of_size(DType::kInt64, experts));
    const Memory work(
        expert_order_workspace_bytes(static_cast<int64_t>(slots), static_cast<int64_t>(experts)));
    api().expert_order({.slots = static_cast<int64_t>(slots),
                        .experts = static_cast<int64_t>(experts),
                        .chosen = c.as<int64_t>(),
                        .keep = has_keep ? k.as<uint8_t>() : nullptr,
                        .place = y[0].as<int64_t>(),
                        .slot = y[1].as<int64_t>(),
                        .counts = y[2].as<int64_t>(),
                        .workspace = static_cast<int*>(work.data())},
                       nullptr);
    return y;
  });
  EXPECT_EQ(out[0].values(), expected.place);
  EXPECT_EQ(out[1].values(), expected.slot);
  EXPECT_EQ(out[2].values(), expected.counts);
}

struct Case {
  DType dtype;
  size_t tokens, per_token, width, experts;
  bool has_keep;
  size_t shift = 0;
};

struct Moved {
  Array x, weights, grad, place;
  Order order;
  explicit Moved(const Case& c)
      : x(c.dtype, random_values(c.tokens * c.width, 1), c.shift),
        weights(c.dtype == DType::kFp64 ? DType::kFp64 : DType::kFp32,
                random_values(c.tokens * c.per_token, 2)),
        grad(c.dtype, random_values(c.tokens * c.width, 3), c.shift),
        place(DType::kInt64, make_order(c).place),
        order(make_order(c)) {}
  static Order make_order(const Case& c) {
    const size_t slots = c.tokens * c.per_token;
    return order_of(random_ids(slots, 4, static_cast<int64_t>(c.experts)),
                    c.has_keep ? random_ids(slots, 5, 2) : Values{}, c.experts);
  }
};

struct Expected {
  Values rows, combined, plain, d_rows, d_weights;
};
Expected reference(const Case& c, const Moved& in) {
  const size_t rows = in.order.slot.size(), width = c.width;
  const Values x = in.x.values(), w = in.weights.values(), g = in.grad.values();
  Expected e{Values(rows * width), Values(x.size()), Values(x.size()), Values(rows * width),
             Values(w.size())};
  for (size_t r = 0; r < rows; ++r) {
    const auto slot = static_cast<size_t>(in.order.slot[r]), n = slot / c.per_token;
    for (size_t d = 0; d < width; ++d) {
      const double v = x[n * width + d];
      e.rows[r * width + d] = v;
      e.combined[n * width + d] += w[slot] * v;
      e.plain[n * width + d] += v;
      e.d_rows[r * width + d] = w[slot] * g[n * width + d];
      e.d_weights[slot] += g[n * width + d] * v;
    }
  }
  return e;
}

void check_rows(const Case& c) {
  SCOPED_TRACE(testing::Message() << name_of(c.dtype) << " " << c.tokens << " x " << c.per_token
                                  << ", width " << c.width);
  const Moved in(c);
  const size_t rows = in.order.slot.size();
  const DType wide = c.dtype == DType::kFp64 ? DType::kFp64 : DType::kFp32;
  const PermuteShape shape{c.dtype, static_cast<int64_t>(c.tokens),
                           static_cast<int64_t>(c.per_token), static_cast<int64_t>(c.width),
                           in.place.as<int64_t>()};
  const auto out = same_bits([&] {
    std::vector<Array> y;
    y.push_back(Array::of_size(c.dtype, rows * c.width, c.shift));
    y.push_back(Array::of_size(c.dtype, c.tokens * c.width, c.shift));
    y.push_back(Array::of_size(c.dtype, c.tokens * c.width, c.shift));
    y.push_back(Array::of_size(c.dtype, rows * c.width, c.shift));
    y.push_back(Array::of_size(wide, c.tokens * c.per_token));
    api().permute_tokens({shape, in.x.data(), y[0].data()}, nullptr);
    api().combine_rows({shape, y[0].data(), in.weights.data(), y[1].data()}, nullptr);
    api().combine_rows({shape, y[0].data(), nullptr, y[2].data()}, nullptr);
    api().combine_rows_backward(
        {shape, in.grad.data(), y[0].data(), in.weights.data(), y[3].data(), y[4].data()}, nullptr);
    return y;
  });
  const Expected e = reference(c, in);
  EXPECT_EQ(out[0].values(), e.rows);
  expect_close(out[1].values(), e.combined, c.dtype, "combined");
  expect_close(out[2].values(), e.plain, c.dtype, "sum");
  expect_close(out[3].values(), e.d_rows, c.dtype, "d_rows");
  expect_close(out[4].values(), e.d_weights, {1e-4, 1e-4}, "d_weights");
}

class Permute : public KernelTest {};
TEST_F(Permute, ExpertOrder_IsStableOverManyChunks) {
  check_order(3000, 8, false);
  check_order(2500, 60, true);
  check_order(1024, 1, true);
  check_order(1, 1024, false);
  check_order(0, 4, false);
}

TEST_F(Permute, RowsAndGradients_MatchReference) {
  const std::vector<Case> cases = {
      {DType::kBf16, 9, 2, 64, 4, false},   {DType::kFp32, 6, 3, 40, 5, true},
      {DType::kFp64, 4, 2, 7, 3, true},     {DType::kBf16, 5, 2, 33, 4, true},
      {DType::kFp32, 1, 1, 1, 1, false},    {DType::kBf16, 0, 2, 8, 4, false},
      {DType::kBf16, 3, 8, 2304, 8, false}, {DType::kFp32, 5, 2, 16, 4, true, 1},
  };
  for (const Case& c : cases) check_rows(c);
}

}  // namespace
}  // namespace capstan::kernels::test
