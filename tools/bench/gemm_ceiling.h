// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The rate at which this machine multiplies, measured between the steps of a benchmark so that both
// see the same neighbours.
#pragma once
#include <ATen/ATen.h>

#include <vector>

#include "capstan/plan/plan.h"

namespace capstan::bench {

// Rates in 1e9 FLOP/s, one per sample.
struct GemmRates {
  std::vector<double> square;  // at::mm of 2048 x 2048 x 2048
  // at::mm of this model's projections and head (q, k, v and gate, up as one each): forward, input
  // gradient and weight gradient at `tokens` rows, caches warm, weighted as in a step.
  std::vector<double> own;
};

class GemmCeiling {
 public:
  // shape: a dense decoder with SwiGLU. tokens: rows of a micro-batch.
  GemmCeiling(const plan::ModelShape& shape, int64_t tokens, at::ScalarType type);
  // Multiplies once with everything; about as much work as one block's step and the head's.
  void sample();
  [[nodiscard]] const GemmRates& rates() const { return rates_; }

 private:
  struct Layer {  // y_NO = x_ND w_DO
    int64_t inputs = 0, outputs = 0, times = 0;
  };
  struct Work {
    double gflop = 0, seconds = 0;
  };
  [[nodiscard]] Work measure(const Layer& layer) const;
  std::vector<Layer> layers_;
  int64_t tokens_;
  at::ScalarType type_;
  GemmRates rates_;
};

}  // namespace capstan::bench
