// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "kernels/array.h"

namespace capstan::kernels::test {
namespace {

struct Case {
  DType table, out;  // backward: buffer, grad
  int64_t tokens, width, first_row, rows, vocabulary;
  size_t shift = 0;
};

Values gathered(const Case& c, const Values& table, const Values& ids) {
  Values out;
  for (const double id : ids)
    for (int64_t d = 0; d < c.width; ++d) {
      const int64_t row = static_cast<int64_t>(id) - c.first_row;
      const bool is_here = row >= 0 && row < c.rows;
      out.push_back(is_here ? table[static_cast<size_t>(row * c.width + d)] : 0.0);
    }
  return out;
}

Values scattered(const Case& c, Values buffer, const Values& grad, const Values& ids) {
  for (size_t n = 0; n < ids.size(); ++n) {
    const int64_t row = static_cast<int64_t>(ids[n]) - c.first_row;
    if (row < 0 || row >= c.rows) continue;
    for (int64_t d = 0; d < c.width; ++d)
      buffer[static_cast<size_t>(row * c.width + d)] +=
          grad[n * static_cast<size_t>(c.width) + static_cast<size_t>(d)];
  }
  return buffer;
}

std::vector<Array> backward(const Case& c, const Array& ids, const Array& grad,
                            const Array& buffer) {
  std::vector<Array> out;
  out.emplace_back(c.table, buffer.values(), c.shift);
  const EmbeddingShape shape{c.tokens, c.width, c.first_row, c.rows};
  const Array work = Array::of_size(DType::kUint8, embedding_workspace_bytes(shape));
  api().embedding_backward({.grad_dtype = c.out,
                            .buffer_dtype = c.table,
                            .shape = shape,
                            .grad = grad.data(),
                            .ids = ids.as<int64_t>(),
                            .buffer = out[0].data(),
                            .workspace = work.data()},
                           nullptr);
  return out;
}

void check_case(const Case& c, const Values& id_values) {
  SCOPED_TRACE(testing::Message() << c.tokens << " tokens, " << c.rows << " x " << c.width);
  const auto elements = static_cast<size_t>(c.rows * c.width);
  const auto outputs = static_cast<size_t>(c.tokens * c.width);
  const Array table(c.table, random_values(elements, 1), c.shift), ids(DType::kInt64, id_values);
  const auto out = same_bits([&] {
    std::vector<Array> y;
    y.push_back(Array::of_size(c.out, outputs, c.shift));
    api().embedding_forward({.table_dtype = c.table,
                             .out_dtype = c.out,
                             .shape = {c.tokens, c.width, c.first_row, c.rows},
                             .table = table.data(),
                             .ids = ids.as<int64_t>(),
                             .out = y[0].data()},
                            nullptr);
    return y;
  });
  const Array expected(c.out, gathered(c, table.values(), id_values));
  EXPECT_EQ(out[0].bytes(), expected.bytes());
  const Array grad(c.out, random_values(outputs, 2), c.shift);
  const auto sums = same_bits([&] { return backward(c, ids, grad, table); });
  expect_close(sums[0].values(), scattered(c, table.values(), grad.values(), id_values), c.table,
               "buffer");
}

class Embedding : public KernelTest {};
TEST_F(Embedding, ForwardAndBackward_MatchReference) {
  constexpr auto k32 = DType::kFp32, k16 = DType::kBf16, k64 = DType::kFp64;
  const std::vector<Case> cases = {
      {k16, k32, 50, 64, 0, 20, 20}, {k32, k16, 33, 40, 5, 9, 20}, {k16, k16, 64, 24, 0, 300, 300},
      {k64, k64, 17, 6, 2, 4, 9},    {k32, k32, 9, 7, 0, 5, 5},    {k32, k32, 1, 1, 0, 1, 1},
      {k32, k32, 0, 8, 0, 4, 4},     {k32, k16, 12, 8, 0, 0, 4},   {k32, k32, 12, 16, 0, 4, 4, 1},
      {k32, k16, 20, 1200, 0, 7, 7},
  };
  for (const Case& c : cases)
    check_case(c, random_ids(static_cast<size_t>(c.tokens), 3, c.vocabulary));
}

TEST_F(Embedding, TokensInManyChunks_AreAddedInTheirOrder) {
  const Case c{DType::kFp32, DType::kFp32, 3000, 8, 0, 40, 40};
  Values ids = random_ids(3000, 3, 40);
  for (size_t i = 0; i < 3000; i += 2) ids[i] = 7;
  check_case(c, ids);
  // The same additions one after another in fp32 give the same bits.
  const Array id(DType::kInt64, ids), grad(DType::kFp32, random_values(3000 * 8, 2));
  const Array buffer(DType::kFp32, random_values(40 * 8, 1));
  const auto out = backward(c, id, grad, buffer);
  std::vector<float> sum;
  for (const double x : buffer.values()) sum.push_back(static_cast<float>(x));
  const Values g = grad.values();
  for (size_t n = 0; n < 3000; ++n)
    for (size_t d = 0; d < 8; ++d)
      sum[static_cast<size_t>(ids[n]) * 8 + d] += static_cast<float>(g[n * 8 + d]);
  EXPECT_EQ(out[0].values(), Values(sum.begin(), sum.end()));
}

}  // namespace
}  // namespace capstan::kernels::test
