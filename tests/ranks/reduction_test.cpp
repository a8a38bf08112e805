// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Gradients that travel in a narrower type than they are kept in.
#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <mutex>

#include "capstan/base/philox.h"
#include "capstan/parallel/parallelize.h"
#include "ranks/engine_fixture.h"
#include "support/run_ranks.h"

namespace capstan::engine::testing {
namespace {

constexpr double kRoundBf16 = 1.0 / 256, kRoundFp32 = 1.0 / (1 << 24);

struct Reduction {
  const char* name;
  std::vector<std::string> overrides;
  int roundings;  // of a number on its way from a rank into the sum, and of the sum
};

const Reduction kReductions[] = {
    {"copies", {}, 2},
    {"zero_1", {"parallel.zero.stage=1"}, 2},
    {"zero_2", {"parallel.zero.stage=2"}, 2},
    {"zero_3_once_a_step", {"parallel.zero.stage=3", "parallel.zero.reduce=step"}, 2},
    {"zero_3_offloaded", {"parallel.zero.stage=3", "parallel.zero.offload=all"}, 2},
    {"hybrid", {"parallel.zero.stage=2", "parallel.zero.shard_size=2"}, 4},
    {"context", {"parallel.context.size=2", "parallel.zero.stage=2"}, 2},
};

TinyRun run_of(const Reduction& reduction, const std::string& type, int64_t bucket_bytes = 1) {
  std::vector<std::string> overrides = reduction.overrides;
  for (const char* more : {"precision.compute=fp32", "batch.micro_samples=1"})
    overrides.push_back(more);
  overrides.push_back("precision.reduction=" + type);
  return {.ranks = 4, .overrides = overrides, .bucket_bytes = bucket_bytes};
}

// What rank `rank` adds to a buffer in one pass: known to all.
Tensor contribution(int rank, size_t pass, int buffer, int64_t numel) {
  const auto seed = static_cast<uint64_t>(rank) * 1000 + pass * 37 + static_cast<uint64_t>(buffer);
  const Tensor values = at::empty({numel}, at::kFloat);
  philox::fill_normal({values.data_ptr<float>(), static_cast<size_t>(numel)}, seed, 0, 0, 1.0);
  return values;
}

void write_gradient(parallel::FlatStore& store, const Tensor& values) {
  for (int p = 0; p < static_cast<int>(store.layout().params.size()); ++p) {
    const auto& local = store.local(p);
    const Tensor part = values.narrow(0, local.flat_begin, local.numel()).view(local.local_shape);
    store.accumulate(
        p, [&](param::GradSlot& slot) { param::add_to_slot(slot, part); }, param::When::kNow);
  }
}

struct Error {
  double against_bound = 0;  // largest |sum - exact| / bound
  double relative = 0;       // largest |sum - exact| / sum of |contributions|
};

// The sums of one step through the gradient buckets of a layout, against those in fp64.
Error error_of_sums(const Reduction& reduction, const std::string& type, int64_t bucket_bytes) {
  const plan::Plan plan = make_tiny_plan(run_of(reduction, type, bucket_bytes));
  const double round = type == "bf16" ? kRoundBf16 : kRoundFp32;
  Error error;
  std::mutex mutex;
  test::run_ranks(4, [&](comm::Communicator world) {
    mesh::Mesh mesh(world, plan.grid);
    auto model = parallel::parallelize(plan, "policy", mesh);
    std::map<int, Tensor> exact, sizes;
    model.buckets->begin_step();
    for (size_t p = 0; p < model.passes.size(); ++p)
      for (size_t i = 0; i < model.passes[p].complete.size(); ++i) {
        const int b = model.passes[p].complete[i];
        auto& store = *model.stores[static_cast<size_t>(b)];
        const int64_t numel = store.layout().numel;
        write_gradient(store, contribution(world.rank(), p, b, numel));
        for (int rank = 0; rank < 4; ++rank) {
          const Tensor x = contribution(rank, p, b, numel).to(at::kDouble);
          exact[b] = exact[b].defined() ? exact[b] + x : x;
          sizes[b] = sizes[b].defined() ? sizes[b] + x.abs() : x.abs();
        }
        model.buckets->complete(b, model.passes[p].is_last[i]);
      }
    model.buckets->finish_step();
    const std::lock_guard lock(mutex);
    for (const auto& [b, sum] : exact) {
      const auto& store = *model.stores[static_cast<size_t>(b)];
      const parallel::Shard shard = store.shard();
      for (const auto& range : shard.ranges) {
        const auto part = [&](const Tensor& x, int64_t begin) {
          return x.narrow(0, begin + range.begin, range.end - range.begin);
        };
        const Tensor off = (part(shard.gradient, 0).to(at::kDouble) - part(sum, shard.begin)).abs();
        const Tensor size = part(sizes.at(b), shard.begin);
        // Every rounding is of numbers of at most `size` in all; kept and added in fp32.
        const Tensor bound = size * (1.02 * reduction.roundings * round + 8 * kRoundFp32);
        error.against_bound = std::max(error.against_bound, (off / bound).max().item<double>());
        error.relative = std::max(error.relative, (off / size).max().item<double>());
      }
    }
  });
  return error;
}

class GradientReduction : public ::testing::TestWithParam<Reduction> {};

TEST_P(GradientReduction, RoundsOnTheWayAndNowhereElse) {
  for (const int64_t bucket_bytes : {int64_t{1}, int64_t{1} << 20}) {
    const Error wide = error_of_sums(GetParam(), "fp32", bucket_bytes);
    const Error narrow = error_of_sums(GetParam(), "bf16", bucket_bytes);
    EXPECT_LE(wide.against_bound, 1);
    EXPECT_LE(narrow.against_bound, 1);
    EXPECT_GE(narrow.relative, kRoundBf16 / 4) << "nothing was rounded";
    fmt::print("{}: fp32 {:.1e}, bf16 {:.1e} of the bound {:.2f}\n", GetParam().name, wide.relative,
               narrow.relative, narrow.against_bound);
  }
}

// Weights of every rank after some steps; ranks that hold the same box hold the same bits.
TEST_P(GradientReduction, RanksHoldTheSameBits) {
  TinyRun run = run_of(GetParam(), "bf16");
  std::map<std::string, Tensor> held;
  std::map<std::string, int> holders;
  std::mutex mutex;
  with_engines(run, [&](int rank, Engine& engine) {
    const auto objective = make_next_token_objective();
    for (int64_t step = 0; step < 3; ++step)
      (void)engine.step(
          make_batches(engine.plan(), engine.plan().grid.data_parallel_index(rank), step),
          *objective);
    const std::lock_guard lock(mutex);
    for (const auto& entry : engine.state_entries()) {
      const std::string key =
          fmt::format("{} {} {}", entry.kind, entry.name, fmt::join(entry.box.begin, ","));
      const auto [first, is_new] = held.try_emplace(key, entry.tensor.clone());
      EXPECT_TRUE(is_new || first->second.equal(entry.tensor)) << key << ", rank " << rank;
      ++holders[key];
    }
  });
  const bool has_copies = std::any_of(holders.begin(), holders.end(),
                                      [](const auto& holder) { return holder.second > 1; });
  const std::string name = GetParam().name;
  EXPECT_EQ(has_copies, name == "copies" || name == "hybrid") << name;
}

// Both ends of a tied model, whose embedding is summed over the stages as well.
TEST(GradientReductionOfARun, StaysCloseToThatInFp32) {
  const Reduction layouts[] = {
      {"tied stages", {"parallel.pipeline.size=2"}, 0},
      {"tensor", {"parallel.tensor=2", "parallel.sequence=true"}, 0},
      {"hybrid", {"parallel.zero.stage=3", "parallel.zero.shard_size=2"}, 0}};
  for (const Reduction& layout : layouts) {
    const TinyResult wide = train(run_of(layout, "fp32")), narrow = train(run_of(layout, "bf16"));
    EXPECT_EQ(wide.reports[0].loss, narrow.reports[0].loss) << "the first forward sees no gradient";
    EXPECT_NE(wide.reports[0].grad_norm, narrow.reports[0].grad_norm);
    for (size_t i = 0; i < wide.reports.size(); ++i) {
      EXPECT_NEAR(narrow.reports[i].loss, wide.reports[i].loss, 2e-3) << layout.name << ' ' << i;
      EXPECT_NEAR(narrow.reports[i].grad_norm / wide.reports[i].grad_norm, 1, 4 * kRoundBf16)
          << layout.name << ' ' << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, GradientReduction, ::testing::ValuesIn(kReductions),
                         [](const auto& of) { return std::string(of.param.name); });

}  // namespace
}  // namespace capstan::engine::testing
