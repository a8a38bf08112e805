// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Random layouts on a device: the run of one rank on the CPU. Tensors live on the fake device and
// travel by NCCL, ops are ATen's or our kernels.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <random>

#include "capstan/base/env.h"
#include "capstan/ops/device_kernels.h"
#include "ranks/equivalence/references.h"
#include "support/fake_device/device_ranks.h"
#include "support/fake_device/fake_device.h"
#include "support/fake_device/fake_kernels.h"

namespace capstan::test {
namespace {

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
    while (static_cast<int64_t>(drawn().size()) < count) draw(random, {});
    // Seldom among free draws.
    for (const char* ranks : {"2", "4", "2", "4"})
      for (const auto before = drawn().size(); drawn().size() == before;)
        draw(random, {{"cp", ranks}, {"method", "ring"}, {"documents", "separate"}});
    install_fake_device();
  }

 private:
  void draw(std::mt19937_64& random, const Fixed& fixed) {
    const auto layout = draw_case(random, fixed, 1000, 8);
    if (!layout) return;
    const ReferenceRun& reference = references_.of(*layout);
    if (!is_on_edge(reference)) drawn().push_back({*layout, &reference});
  }

  References references_;
};
const auto* const layouts = ::testing::AddGlobalTestEnvironment(new Layouts);

void compare_all(size_t first, size_t step) {
  const auto runner = [](int n, const auto& fn) { run_device_ranks(n, fn); };
  double worst = 0;
  int ranks = 0, failed = 0;
  for (size_t i = first; i < Layouts::drawn().size() && failed < 3; i += step) {
    const auto& [layout, reference] = Layouts::drawn()[i];
    const Comparison result = compare_layout(layout, *reference, kDeviceSteps, runner);
    worst = std::max(worst, result.error());
    ranks += layout.ranks();
    const std::string complaint = complaint_of(layout, result);
    if (complaint.empty()) continue;
    ++failed;
    ADD_FAILURE() << complaint;
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
