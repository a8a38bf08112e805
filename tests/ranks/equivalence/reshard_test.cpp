// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Pairs of layouts on rank threads. CAPSTAN_LAYOUTS sets their number.
#include "ranks/equivalence/reshard.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <map>

#include "support/temp_dir.h"

namespace capstan::test {
namespace {

constexpr int kSteps = 4;

TEST(Reshard, AnyLayoutGoesOnFromAnyOther) {
  const char* wanted = std::getenv("CAPSTAN_LAYOUTS");
  const int count = wanted ? std::stoi(wanted) : 40;
  std::mt19937_64 random(7);
  std::map<std::string, ReferenceRun> references;
  for (int i = 0; i < count; ++i) {
    const LayoutCase any = draw_case(random, {}, 1000, 8).value();
    const LayoutCase first = draw_like(random, any, 8), second = draw_like(random, any, 8);
    // Every fourth pair goes to or comes from one rank.
    const LayoutCase from = i % 8 == 3 ? first.one_rank() : first;
    const LayoutCase to = i % 8 == 7 ? second.one_rank() : second;
    SCOPED_TRACE(fmt::format("{}  ->  {}", from.describe(), to.describe()));
    auto found = references.find(from.model_key());
    if (found == references.end())
      found = references.emplace(from.model_key(), run_reference(from, kSteps)).first;
    const TempDir folder("reshard");
    const SavedRun saved = train_and_save(from, folder.path());
    load_and_go_on(to, folder.path(), saved, found->second);
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace capstan::test
