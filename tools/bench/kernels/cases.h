// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Every kernel at training sizes: report() for each.
#pragma once
#include <cstdint>
#include <string>

#include "capstan/base/dtype.h"

namespace capstan::bench {

constexpr auto k16 = DType::kBf16, k32 = DType::kFp32;

// What the sizes are divided by where time does not count.
struct Scale {
  int64_t rows = 1, width = 1;
};

[[nodiscard]] std::string shape_text(int64_t rows, int64_t width);
[[nodiscard]] inline size_t size(int64_t count, int64_t bytes) {
  return static_cast<size_t>(count * bytes);
}

void run_layers(const Scale& scale);      // of a block, but for experts
void run_vocabulary(const Scale& scale);  // embedding and loss
void run_experts(const Scale& scale);
void run_optimizers(const Scale& scale);
inline void run_all(const Scale& scale = {}) {
  run_layers(scale);
  run_vocabulary(scale);
  run_experts(scale);
  run_optimizers(scale);
}

}  // namespace capstan::bench
