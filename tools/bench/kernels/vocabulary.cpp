// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Embedding and loss.
#include <fmt/format.h>

#include <cmath>
#include <random>

#include "cases.h"
#include "timing.h"

namespace capstan::bench {
namespace {

using namespace kernels;

// Ids as frequent as words are: a few rows take most of the tokens.
std::vector<int64_t> word_ids(int64_t count, int64_t vocabulary) {
  std::mt19937_64 engine(1);
  std::uniform_real_distribution<double> uniform(0.0, std::log(static_cast<double>(vocabulary)));
  std::vector<int64_t> ids(static_cast<size_t>(count));
  for (int64_t& id : ids) id = static_cast<int64_t>(std::exp(uniform(engine))) - 1;
  return ids;
}

void embedding(int64_t tokens, int64_t vocabulary, int64_t width) {
  const auto id_values = word_ids(tokens, vocabulary);
  const DeviceMemory table(size(vocabulary * width, 2)), buffer(size(vocabulary * width, 4)),
      ids(id_values), out(size(tokens * width, 4));
  const EmbeddingShape shape{tokens, width, 0, vocabulary};
  const DeviceMemory work(api().embedding_workspace_bytes(shape));
  const std::string text = fmt::format("{} of {} x {}", tokens, vocabulary, width);
  const double n = static_cast<double>(tokens * width);
  report(
      "embedding_forward", text, n * 6, median_us([&](Stream s) {
        api().embedding_forward({k16, k32, shape, table.data(), ids.as<int64_t>(), out.data()}, s);
      }));
  report("embedding_backward", text, n * 4, median_us([&](Stream s) {
           api().embedding_backward(
               {k32, k32, shape, out.data(), ids.as<int64_t>(), buffer.data(), work.data()}, s);
         }));
}

struct Logits {
  DeviceMemory values, targets, numbers;  // numbers: one per row
  LogitRows rows;
  Logits(int64_t count, int64_t columns)
      : values(size(count * columns, 2)), targets(size(count, 8)), numbers(size(count, 4)) {
    rows = {.logits = values.data(),
            .rows = count,
            .columns = columns,
            .row_stride = columns,
            .targets = targets.as<int64_t>()};
  }
};

void cross_entropy(int64_t rows, int64_t columns) {
  const Logits logits(rows, columns);
  const DeviceMemory weights(size(rows, 4));
  report("cross_entropy", shape_text(rows, columns), static_cast<double>(rows * columns * 4),
         median_us([&](Stream s) {
           api().cross_entropy({logits.rows, weights.data(), logits.numbers.data()}, s);
         }));
}

// One rank's part of a vocabulary that is cut.
void cut_cross_entropy(int64_t rows, int64_t columns) {
  const Logits logits(rows, columns);
  const DeviceMemory top(size(rows, 4)), sum(size(rows, 4)), picked(size(rows, 4)),
      lse(size(rows, 4));
  const std::string text = shape_text(rows, columns), line = fmt::format("{}", rows);
  const double all = static_cast<double>(rows * columns), one = static_cast<double>(rows);
  report("logit_stats", text, all * 2, median_us([&](Stream s) {
           api().logit_stats({logits.rows, top.data(), sum.data(), picked.data()}, s);
         }));
  report("rescale_sums", line, one * 16, median_us([&](Stream s) {
           api().rescale_sums({k32, rows, top.data(), top.data(), sum.data()}, s);
         }));
  report("finish_stats", line, one * 28, median_us([&](Stream s) {
           api().finish_stats({k32, rows, top.data(), sum.data(), picked.data(),
                               logits.targets.as<int64_t>(), lse.data(), logits.numbers.data()},
                              s);
         }));
  report("logit_gradient", text, all * 4, median_us([&](Stream s) {
           api().logit_gradient({logits.rows, lse.data(), logits.numbers.data()}, s);
         }));
}

}  // namespace

void run_vocabulary(const Scale& scale) {
  embedding(16384 / scale.rows, 151936 / scale.width, 2048 / scale.width);
  cross_entropy(4096 / scale.rows, 50257 / scale.width);
  cross_entropy(2048 / scale.rows, 151936 / scale.width);
  cut_cross_entropy(2048 / scale.rows, 151936 / 8 / scale.width);
}

}  // namespace capstan::bench
