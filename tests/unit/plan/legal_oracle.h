// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Random recipes over the axes of a layout, and what speaks against one: from counting alone, or
// because this build has a limit. Knows nothing of the plan's own rules.
#pragma once
#include <map>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace capstan::plan::testing {

// Recipe keys with the values they are set to, and the ranks that are started.
struct Draw {
  std::map<std::string, std::string> values;
  int64_t world = 1;

  [[nodiscard]] std::vector<std::string> overrides() const;
  [[nodiscard]] std::string describe() const;
};

// Every key is drawn on its own and most keep their default; half of the values that only fit one
// number (ranks, samples) are set to it.
[[nodiscard]] Draw draw_recipe(std::mt19937_64& random);

// Why a drawn recipe cannot be honoured, and the keys that have a part in it.
struct Reason {
  std::string name;
  std::set<std::string> keys;
  std::set<std::string> hides = {};  // names of reasons that cannot be judged beside it
};
// Things that do not come out even: no program could lay the run out so.
[[nodiscard]] std::vector<Reason> contradictions(const Draw& draw);
// What this build does not do although it could be done, or what would do nothing; all of them are
// in docs/parallelism.md, "What is refused".
[[nodiscard]] std::vector<Reason> limits(const Draw& draw);
// Names of all reasons that a sufficient number of draws must show.
[[nodiscard]] const std::vector<std::string>& reason_names();

}  // namespace capstan::plan::testing
