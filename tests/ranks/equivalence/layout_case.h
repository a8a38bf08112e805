// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Random legal layouts of a small model, as recipes. A case is a value for every axis; what the
// plan accepts is legal.
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "capstan/plan/plan.h"

namespace capstan::test {

struct LayoutAxis {
  std::string name;
  std::vector<std::string> values;  // the first one is neutral
};
// All axes of the generator. Those of the model change the numbers, the others must not.
[[nodiscard]] const std::vector<LayoutAxis>& model_axes();
[[nodiscard]] const std::vector<LayoutAxis>& layout_axes();

struct LayoutCase {
  std::map<std::string, std::string> values;  // by axis, model and layout
  std::string compute = "fp64", moments = "auto";

  [[nodiscard]] int number(const std::string& axis) const { return std::stoi(values.at(axis)); }
  [[nodiscard]] int ranks() const;
  [[nodiscard]] std::vector<std::string> overrides() const;  // --set KEY=VALUE
  [[nodiscard]] std::string describe() const;                // only what is not neutral
  [[nodiscard]] std::string model_key() const;  // cases with the same key are the same run
  [[nodiscard]] LayoutCase one_rank() const;
  // Axes of ranks longer than one.
  [[nodiscard]] int wide_axes() const;
};

[[nodiscard]] plan::Plan make_case_plan(const LayoutCase& layout);  // throws RecipeError

// Draws until the plan accepts; the given values are kept. Nothing after `tries` refusals.
using Fixed = std::vector<std::pair<std::string, std::string>>;
[[nodiscard]] std::optional<LayoutCase> draw_case(std::mt19937_64& random, const Fixed& fixed,
                                                  int tries, int most_ranks = 16);

using Pair = std::pair<std::pair<std::string, std::string>, std::pair<std::string, std::string>>;

// `count` cases such that every pair of values of two axes that some legal case has is in one of
// them. `pairs` receives the pairs that are covered.
[[nodiscard]] std::vector<LayoutCase> draw_cases(uint64_t seed, int count,
                                                 std::vector<Pair>* pairs = nullptr);

}  // namespace capstan::test
