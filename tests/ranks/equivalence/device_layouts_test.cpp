// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Random layouts on a device: the run of one rank on the CPU. Tensors live on the fake device and
// travel by NCCL, ops are ATen's or our kernels.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <map>
#include <random>

#include "capstan/base/env.h"
#include "capstan/base/text.h"
#include "capstan/ops/device_kernels.h"
#include "ranks/equivalence/equivalence.h"
#include "support/fake_device/device_ranks.h"
#include "support/fake_device/fake_device.h"
#include "support/fake_device/fake_kernels.h"

namespace capstan::test {
namespace {

constexpr int kSteps = 3;
constexpr double kBar = 1e-9;

struct Drawn {
  LayoutCase layout;
  const ReferenceRun* reference;
};

// The one-rank runs are made before there is a device: a process has one.
class Layouts : public ::testing::Environment {
 public:
  static std::vector<Drawn>& drawn() {
    static std::vector<Drawn> all;
    return all;
  }
  void SetUp() override {
    const auto count = read_env_int("CAPSTAN_DEVICE_LAYOUTS", 1, 100'000).value_or(20);
    std::mt19937_64 random(11);
    while (static_cast<int64_t>(drawn().size()) < count) {
      auto layout = draw_case(random, {}, 1000, 8);
      if (!layout) continue;
      const auto [run, is_new] = references_.try_emplace(layout->model_key());
      if (is_new) run->second = run_reference(*layout, kSteps);
      // Another choice of experts or sign would be as right.
      if (run->second.margin < 1e-9 || run->second.direction < 1e-13) continue;
      drawn().push_back({*layout, &run->second});
    }
    install_fake_device();
  }

 private:
  std::map<std::string, ReferenceRun> references_;
};
const auto* const layouts = ::testing::AddGlobalTestEnvironment(new Layouts);

void compare_all(size_t first, size_t step) {
  const auto runner = [](int n, const auto& fn) { run_device_ranks(n, fn); };
  double worst = 0;
  int ranks = 0, failed = 0;
  for (size_t i = first; i < Layouts::drawn().size() && failed < 3; i += step) {
    const auto& [layout, reference] = Layouts::drawn()[i];
    const Comparison result = compare_layout(layout, *reference, kSteps, runner);
    worst = std::max(worst, result.error());
    ranks += layout.ranks();
    if (result.error() <= kBar) continue;
    ++failed;
    ADD_FAILURE() << layout.describe() << "\n  error " << result.error() << " (loss " << result.loss
                  << ", norm " << result.norm << ", eval " << result.eval << ", state "
                  << result.state << " in " << result.worst << ") " << result.failure
                  << "\n  reproduce: " << layout.ranks() << " ranks, --set "
                  << join(layout.overrides(), " --set ");
  }
  fmt::print("{} ranks on the device, worst error {:.1e}\n", ranks, worst);
}

TEST(DeviceLayouts, GiveTheRunOfOneRankOnTheCpu) { compare_all(0, 2); }

TEST(DeviceLayouts, GiveItByOurKernelsToo) {
  ops::install_device_kernels(&fake_kernels());
  compare_all(1, 2);
  ops::install_device_kernels(nullptr);
}

}  // namespace
}  // namespace capstan::test
