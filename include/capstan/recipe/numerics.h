// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Optimizer and precision; part of recipe.h, whose rules hold here.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace capstan::recipe {

struct SpikeSkip {
  std::optional<double> sigma;  // none
  int64_t window = 128;
};
struct Sophia {
  double rho = 0.04;
  int64_t interval = 10;  // steps between estimates of the curvature
};
struct Optimizer {
  std::string name = "adamw";    // adamw | lion | sophia
  std::string moments = "auto";  // auto = type of the master weights | bf16 | int8
  double lr = 0;
  std::vector<double> betas = {0.9, 0.95};
  double eps = 1e-8;
  double weight_decay = 0.1;
  std::optional<double> max_grad_norm = 1.0;  // none = no clipping
  int64_t nonfinite_limit = 10;
  SpikeSkip spike_skip;
  Sophia sophia;
  bool in_backward = false;  // each block is updated in the backward, its gradient memory reused
};

struct Fp8 {
  std::string scaling = "none";    // none = no fp8 | tensor | row | delayed
  std::string gradients = "e5m2";  // e5m2 | e4m3
  int64_t history = 16;            // delayed: steps the maximum is taken over
};
struct Precision {
  std::string compute = "auto";  // auto | bf16 | fp32 | fp16 | fp64
  std::string residual = "auto";
  std::string master = "fp32";
  std::string gradients = "fp32";
  std::string reduction = "auto";      // auto = gradients
  std::vector<std::string> keep_fp32;  // patterns over names of parameters
  std::optional<double> loss_scale;    // none = dynamic; fp16 only
  Fp8 fp8;
};

}  // namespace capstan::recipe
