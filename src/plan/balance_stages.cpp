// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "capstan/base/check.h"
#include "capstan/base/error.h"
#include "capstan/plan/schedule.h"

namespace capstan::plan {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();

// The cheapest way to cut the first `end` blocks into `parts`, and where its last part begins.
struct Cut {
  double most = kNever;     // cost of its most expensive part
  double squares = kNever;  // sum over the parts of cost^2
  int begin = -1;
};

class Splitter {
 public:
  explicit Splitter(const std::vector<double>& cost) : sums_(cost.size() + 1, 0) {
    std::partial_sum(cost.begin(), cost.end(), sums_.begin() + 1);
    rounding_ = 1e-12 * sums_.back();  // equal costs may differ in the last bits of their sums
  }

  std::vector<int> split(int stages) {
    // The least possible maximum first: with it as a bound the sum of squares may be added up part
    // by part, which the pair of both may not.
    const double bound = fill(stages, kNever).back().back().most + rounding_;
    const auto table = fill(stages, bound);
    std::vector<int> first(static_cast<size_t>(stages));
    for (int parts = stages, end = blocks(); parts > 0; --parts) {
      end = table[static_cast<size_t>(parts)][static_cast<size_t>(end)].begin;
      first[static_cast<size_t>(parts) - 1] = end;
    }
    return first;
  }

 private:
  using Table = std::vector<std::vector<Cut>>;  // [parts][end]

  [[nodiscard]] int blocks() const { return static_cast<int>(sums_.size()) - 1; }
  [[nodiscard]] double cost(int begin, int end) const {
    return sums_[static_cast<size_t>(end)] - sums_[static_cast<size_t>(begin)];
  }

  // Without a bound the smallest maximum decides, with one the smallest sum of squares.
  [[nodiscard]] Table fill(int stages, double bound) const {
    Table table(static_cast<size_t>(stages) + 1, std::vector<Cut>(sums_.size()));
    table[0][0] = {0, 0, -1};
    for (int parts = 1; parts <= stages; ++parts)
      for (int end = parts; end <= blocks() - (stages - parts); ++end)
        table[static_cast<size_t>(parts)][static_cast<size_t>(end)] =
            best_cut(table[static_cast<size_t>(parts) - 1], end, bound);
    return table;
  }
  [[nodiscard]] Cut best_cut(const std::vector<Cut>& before, int end, double bound) const {
    Cut best;
    const double tie = rounding_ * sums_.back();
    // From the left: of equal cuts the one with the longest last part stays.
    for (int begin = 0; begin < end; ++begin) {
      const Cut& rest = before[static_cast<size_t>(begin)];
      const double last = cost(begin, end);
      if (rest.most == kNever || last > bound) continue;
      const Cut cut{std::max(rest.most, last), rest.squares + last * last, begin};
      const bool better = bound == kNever ? cut.most < best.most : cut.squares < best.squares - tie;
      if (best.begin < 0 || better) best = cut;
    }
    return best;
  }

  std::vector<double> sums_;
  double rounding_ = 0;
};

}  // namespace

std::vector<int> balance_stages(const std::vector<double>& block_cost, int stages) {
  CAPSTAN_CHECK(stages >= 1, "a split into {} stages", stages);
  for (const double cost : block_cost)
    CAPSTAN_CHECK(cost >= 0 && std::isfinite(cost), "a block that costs {}", cost);
  if (block_cost.size() < static_cast<size_t>(stages))
    throw ConfigError(
        ErrorText{.module = "plan",
                  .what = "splitting the model into pipeline stages",
                  .got = fmt::format("{} blocks for {} stages", block_cost.size(), stages),
                  .need = "a block for every stage",
                  .fix = "Lower parallel.pipeline.size or parallel.pipeline.chunks"});
  return Splitter(block_cost).split(stages);
}

}  // namespace capstan::plan
