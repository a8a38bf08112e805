// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// TensorBoard event files: TFRecord framing (length, masked CRC-32C, payload, masked CRC-32C)
// around Event messages. Losing an event never stops training: the first failure is logged, later
// ones are counted.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "capstan/base/file.h"

namespace capstan::metrics {

// Counts per bucket; limits[i] is the upper end of bucket i and the lower end of the next.
struct Histogram {
  double min = 0, max = 0, count = 0, sum = 0, sum_squares = 0;
  std::vector<double> limits, counts;
};
// Exponential buckets (ratio 1.1) around zero; empty buckets at both ends are cut, non-finite
// values left out.
[[nodiscard]] Histogram make_histogram(std::span<const float> values);

// Thread-safe.
class TensorboardWriter {
 public:
  // Creates `directory` and a new file events.out.tfevents.<seconds>.<host>.<pid>.<number> in it.
  explicit TensorboardWriter(const Path& directory);
  ~TensorboardWriter();
  TensorboardWriter(const TensorboardWriter&) = delete;
  TensorboardWriter& operator=(const TensorboardWriter&) = delete;

  void add_scalar(std::string_view tag, double value, int64_t step);
  void add_text(std::string_view tag, std::string_view markdown, int64_t step);
  void add_histogram(std::string_view tag, const Histogram& histogram, int64_t step);
  [[nodiscard]] const Path& path() const;
  [[nodiscard]] int64_t dropped() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// CRC-32C (Castagnoli) and its masked form as TFRecord files carry it.
[[nodiscard]] uint32_t crc32c(std::span<const std::byte> bytes);
[[nodiscard]] uint32_t masked_crc32c(std::span<const std::byte> bytes);

}  // namespace capstan::metrics
