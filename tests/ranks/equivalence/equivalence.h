// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Runs a layout on rank threads and compares it with the one-rank run of the same recipe: losses,
// gradient norms, every element of every parameter and of the optimizer's state on every rank.
#pragma once
#include <ATen/core/Tensor.h>

#include <cmath>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "capstan/engine/engine.h"
#include "ranks/equivalence/layout_case.h"

namespace capstan::test {

struct ReferenceRun {
  std::vector<engine::StepReport> reports;
  double eval_loss = 0;
  double margin = INFINITY;                 // by which the closest choice of an expert was made
  double direction = INFINITY;              // the sign, or Sophia's quotient, of the smallest sum
  std::map<std::string, at::Tensor> state;  // "kind/name" -> whole tensor
};

struct Comparison {
  double loss = 0, norm = 0, eval = 0;  // largest relative error
  double state = 0;                     // over tensors: max |a - b| / max(|b|max, 1e-3)
  double experts = 0;                   // statistics of expert layers, in every step
  std::string worst;                    // tensor of the largest state error
  std::string failure;                  // what a rank threw
  std::string first_hash;               // of all weights after one step
  [[nodiscard]] double error() const;
};

// Largest error of what a rank holds.
[[nodiscard]] double state_error(engine::Engine& engine, const ReferenceRun& reference);
[[nodiscard]] ReferenceRun run_reference(const LayoutCase& layout, int steps);
// Runs fn(world) on n ranks; run_ranks unless told otherwise.
using RankRunner =
    std::function<void(int n, const std::function<void(comm::Communicator world)>& fn)>;
[[nodiscard]] Comparison compare_layout(const LayoutCase& layout, const ReferenceRun& reference,
                                        int steps, const RankRunner& runner = {});

// Of all weights after one step; what a rank threw, where one did.
[[nodiscard]] std::string hash_after_one_step(const LayoutCase& layout);

// What rank 0 does in one step: "forward 3", "gather 4", "backward 3", "reduce 0".
[[nodiscard]] std::vector<std::string> trace_of_first_step(const LayoutCase& layout);

}  // namespace capstan::test
