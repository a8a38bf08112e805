// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>

#include "capstan/base/error.h"
#include "capstan/base/philox.h"
#include "capstan/kernels/dynamic_code.h"
#include "capstan/optim/flat_update.h"
#include "optim/cpu/kernels.h"
#include "wave.h"

namespace capstan::optim {
namespace {

struct Fixture {
  FlatTensors t;
  explicit Fixture(int64_t count, at::ScalarType type = at::kDouble) {
    t.weights = wave(count, 0.1, type);
    t.gradient = wave(count, 1.3, type).mul_(0.5);
    t.first = at::zeros({count}, type);
    t.second = wave(count, 2.1, type).square_();
  }
  [[nodiscard]] FlatJob job(bool decay = true) const { return {&t, 0, t.weights.numel(), decay}; }
  void update(const FlatStep& step, bool decay = true) const {
    const FlatJob whole = job(decay);
    update_flat(UpdateRule::kSophia, {&whole, 1}, step);
  }
  void observe(const CurvatureStep& step) const {
    const FlatJob whole = job();
    update_curvature({&whole, 1}, step);
  }
};

const FlatStep kStep{.lr = 1e-2, .beta1 = 0.965, .beta2 = 0.99, .weight_decay = 0.1, .rho = 0.04};

// The authors' program on three steps of three weights, with labels drawn after the first: the
// curvature there is without the 8 tokens of the batch, which come in at the quotient.
TEST(Sophia, ThreeSteps_AreTheAuthors) {
  Fixture f(3);
  f.t.weights.copy_(at::tensor({1.0, -2.0, 0.5}, at::kDouble));
  f.t.second.zero_();
  const double gradients[3][3] = {{0.1, -0.2, 0}, {-0.5, 0.05, 0.3}, {0.02, 0.4, -0.1}};
  for (int t = 0; t < 3; ++t) {
    f.t.gradient.copy_(at::tensor(at::ArrayRef<double>(gradients[t], 3)));
    f.update(kStep);
    if (t > 0) continue;
    f.t.gradient.copy_(at::tensor({0.3, 0.1, 0.2}, at::kDouble));
    f.observe({.beta2 = 0.99, .tokens = 8});
  }
  EXPECT_LT(difference(f.t.weights, at::tensor({1.0070130, -1.9840360, 0.4785115}, at::kDouble)),
            1e-7);
  EXPECT_LT(difference(f.t.first, at::tensor({-0.0129282, 0.0091702, 0.0066325}, at::kDouble)),
            1e-7);
  EXPECT_LT(difference(f.t.second, at::tensor({9e-4, 1e-4, 4e-4}, at::kDouble) * 8), 1e-15);
}

TEST(Sophia, AnyStep_EqualsThePaperInFp64) {
  Fixture f(1000);
  Tensor w = f.t.weights.clone(), m = at::zeros({1000}, at::kDouble), h = f.t.second.clone();
  FlatStep step = kStep;
  step.rho = 0.5;
  step.gradient_scale = 0.25;
  int64_t clipped = 0;
  for (int t = 1; t <= 3; ++t) {
    const Tensor g = wave(1000, t);
    f.t.gradient.copy_(g);
    f.update(step);
    m = m * 0.965 + g * 0.25 * 0.035;
    const Tensor quotient = m / (h * 0.5 + 1e-15);
    clipped += quotient.abs().gt(1).sum().item<int64_t>();
    w = w * (1 - 1e-2 * 0.1) - quotient.clamp(-1, 1) * 1e-2;
    f.t.gradient.copy_(g * 12);
    f.observe({.beta2 = 0.99, .tokens = 7, .gradient_scale = 0.25});
    h = h * 0.99 + g.square() * 9 * 7 * 0.01;
  }
  EXPECT_LT(difference(f.t.weights, w), 1e-15);
  EXPECT_LT(difference(f.t.first, m), 1e-16);
  EXPECT_LT(difference(f.t.second, h), 1e-14);
  EXPECT_GT(clipped, 50);
  EXPECT_LT(clipped, 2900);
}

TEST(Sophia, NothingKnown_MovesNothing) {
  Fixture f(512, at::kFloat);
  f.t.gradient.zero_();
  f.t.second.zero_();
  const Tensor before = f.t.weights.clone();
  f.update(kStep, false);
  EXPECT_TRUE(f.t.weights.equal(before));
}

TEST(Sophia, CurvatureOfWhatIsNotFinite_Stays) {
  Fixture f(5000, at::kFloat);
  f.t.gradient = f.t.gradient.to(at::kBFloat16);
  f.t.gradient[7] = std::numeric_limits<double>::infinity();
  f.t.gradient[4999] = std::numeric_limits<double>::quiet_NaN();
  const Tensor before = f.t.second.clone();
  const FlatJob part{&f.t, 3, 5000};
  update_curvature({&part, 1}, {.beta2 = 0.5, .tokens = 2});
  const Tensor changed = f.t.second.ne(before);
  EXPECT_FALSE(changed.narrow(0, 0, 3).any().item<bool>());
  EXPECT_FALSE(changed[7].item<bool>());
  EXPECT_FALSE(changed[4999].item<bool>());
  EXPECT_GT(changed.sum().item<int64_t>(), 4900);
  EXPECT_TRUE(f.t.second.isfinite().all().item<bool>());
}

TEST(Sophia, SameBitsForAnyThreadCountAndInstructionSet) {
  const int before = at::get_num_threads();
  std::vector<Fixture> runs;
  for (const int threads : {1, 2}) {
    at::set_num_threads(threads);
    runs.emplace_back(100003, at::kFloat).update(kStep);
  }
  at::set_num_threads(before);
  const Fixture f(100003, at::kFloat);
  cpu::plain::kKernels.sophia.f32(
      {f.t.weights.data_ptr<float>(), f.t.gradient.data_ptr<float>(), f.t.first.data_ptr<float>(),
       f.t.second.data_ptr<float>(), 100003, 0},
      {.gradient_scale = 1,
       .decay = static_cast<float>(1 - kStep.lr * kStep.weight_decay),
       .beta1 = static_cast<float>(kStep.beta1),
       .rest1 = static_cast<float>(1 - kStep.beta1),
       .step_size = static_cast<float>(kStep.lr),
       .rho = static_cast<float>(kStep.rho)});
  for (const Fixture& run : runs) {
    EXPECT_TRUE(run.t.weights.equal(f.t.weights));
    EXPECT_TRUE(run.t.first.equal(f.t.first));
    EXPECT_TRUE(run.t.second.equal(f.t.second));
  }
}

// Curvature of 16 and 8 bits against scalar references.
constexpr CurvatureStep kObserved{
    .beta2 = 0.9, .tokens = 12, .gradient_scale = 0.25, .count = 5, .seed = 7};
constexpr uint64_t kFirstIndex = 0xffffff00;  // indices pass 2^32
const kernels::DynamicCode& kCode = kernels::kMomentCodes.second;

struct NarrowFixture : Fixture {
  NarrowFixture(int64_t count, at::ScalarType type) : Fixture(count, at::kFloat) {
    const bool blocks = type == at::kByte;
    t.first = at::zeros({count}, type);
    t.second = blocks ? at::arange(count, at::kLong).mul_(91).to(at::kByte) : t.second.to(type);
    if (!blocks) return;
    t.first_scale = at::zeros({count / 256}, at::kFloat);
    t.second_scale = wave(count / 256, 0.9, at::kFloat).abs_();
  }
  // One block after the other, and all at once.
  void observe_numbered(int64_t parts) const {
    const int64_t size = t.weights.numel() / parts;
    std::vector<FlatJob> jobs;
    for (int64_t i = 0; i < parts; ++i)
      jobs.push_back(
          {&t, i * size, (i + 1) * size, true, kFirstIndex + static_cast<uint64_t>(i * size)});
    update_curvature(jobs, kObserved);
  }
  [[nodiscard]] Tensor curvature() const {
    if (!t.second_scale.defined()) return t.second.to(at::kFloat);
    const Tensor numbers = at::tensor(at::ArrayRef<float>(kCode.number, 256));
    return numbers.index_select(0, t.second.to(at::kLong)).view({-1, 256}) *
           t.second_scale.unsqueeze(1);
  }
};

float estimated(float gradient, float h) {
  const float g = gradient * 0.25F;
  return (g * g) * static_cast<float>((1 - 0.9) * 12) + h * static_cast<float>(0.9);
}
uint32_t random_of(int64_t i) {
  return philox::draw(7, 5, kFirstIndex + static_cast<uint64_t>(i))[1];
}

TEST(Bf16Curvature, IsRoundedByTheBitsOfItsElement) {
  const NarrowFixture before(1536, at::kBFloat16), f(1536, at::kBFloat16), cut(1536, at::kBFloat16);
  f.observe_numbered(1);
  cut.observe_numbered(6);
  for (int64_t i = 0; i < 1536; ++i) {
    const float h = estimated(f.t.gradient[i].item<float>(), before.t.second[i].item<float>());
    const uint32_t bits = std::bit_cast<uint32_t>(h) + (random_of(i) & 0xffffU);
    ASSERT_EQ(f.t.second[i].item<float>(), std::bit_cast<float>(bits & 0xffff0000U)) << i;
  }
  EXPECT_TRUE(f.t.second.equal(cut.t.second));
}

// Of the two numbers around x the one that the bits say, by looking at all of them.
uint8_t drawn(float x, uint32_t random) {
  int below = 0;
  while (below < 255 && kCode.number[below + 1] <= x) ++below;
  if (below == 255) return 255;
  const float low = kCode.number[below], gap = kCode.number[below + 1] - low;
  const bool up = static_cast<float>(random >> 8) / 16777216.0F * gap < x - low;
  return static_cast<uint8_t>(up ? below + 1 : below);
}

TEST(EightBitCurvature, IsReadUpdatedAndCodedBlockByBlock) {
  const NarrowFixture before(1536, at::kByte), f(1536, at::kByte), cut(1536, at::kByte);
  f.observe_numbered(1);
  cut.observe_numbered(6);
  for (int64_t block = 0; block < 6; ++block) {
    float h[256], largest = 0;
    for (int64_t j = 0; j < 256; ++j) {
      const int64_t i = block * 256 + j;
      const float old = kCode.number[before.t.second[i].item<uint8_t>()] *
                        before.t.second_scale[block].item<float>();
      h[j] = estimated(f.t.gradient[i].item<float>(), old);
      largest = std::max(largest, h[j]);
    }
    ASSERT_EQ(f.t.second_scale[block].item<float>(), largest);
    for (int64_t j = 0; j < 256; ++j)
      ASSERT_EQ(f.t.second[block * 256 + j].item<uint8_t>(),
                drawn(h[j] / largest, random_of(block * 256 + j)));
  }
  EXPECT_TRUE(f.t.second.equal(cut.t.second));
  EXPECT_TRUE(f.t.second_scale.equal(cut.t.second_scale));
}

// A hundredth of the way to gradients half as large, 300 times: rounded to nearest, most would
// stand still, as steps of the code are larger.
TEST(NarrowCurvature, CreepsAsThatOfFp32) {
  for (const auto type : {at::kBFloat16, at::kByte}) {
    const NarrowFixture narrow(16384, type);
    Fixture wide(16384, at::kFloat);
    narrow.t.second.zero_();
    wide.t.second.zero_();
    narrow.t.gradient.uniform_(0.5, 1);
    narrow.t.gradient.view({-1, 256}).select(1, 0).fill_(2);
    wide.t.gradient = narrow.t.gradient;
    narrow.observe({.beta2 = 0});
    wide.observe({.beta2 = 0});
    narrow.t.gradient.mul_(0.5);
    narrow.t.gradient.view({-1, 256}).select(1, 0).fill_(2);
    for (int64_t count = 1; count <= 300; ++count) {
      const FlatJob jobs[] = {narrow.job(), wide.job()};
      update_curvature(jobs, {.beta2 = 0.99, .count = count, .seed = 3});
    }
    const double want = wide.t.second.mean().item<double>();
    EXPECT_NEAR(narrow.curvature().mean().item<double>() / want, 1, 2e-3) << type;
    EXPECT_LT(difference(narrow.curvature().reshape({-1}), wide.t.second), 0.3) << type;
  }
}

TEST(NarrowCurvature, AllInstructionSetsGiveTheSameBits) {
  const cpu::CurvatureFactors<float> factors{0.25F, 1.2F, 0.9F, 7, 5};
  const auto run = [&](const cpu::CurvatureKernels& k, NarrowFixture& wide, NarrowFixture& bf16,
                       NarrowFixture& blocks) {
    const auto* const g = wide.t.gradient.const_data_ptr<float>();
    k.f32({g, wide.t.second.data_ptr<float>(), nullptr, 2048, 0}, factors);
    k.bf16_moments({g, static_cast<uint16_t*>(bf16.t.second.data_ptr()), nullptr, 2048, 9},
                   factors);
    k.blocks(
        {g, blocks.t.second.data_ptr<uint8_t>(), blocks.t.second_scale.data_ptr<float>(), 2048, 9},
        factors, kCode);
  };
  NarrowFixture here[] = {{2048, at::kFloat}, {2048, at::kBFloat16}, {2048, at::kByte}};
  NarrowFixture plain[] = {{2048, at::kFloat}, {2048, at::kBFloat16}, {2048, at::kByte}};
  run(cpu::kernels().curvature, here[0], here[1], here[2]);
  run(cpu::plain::kKernels.curvature, plain[0], plain[1], plain[2]);
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(here[i].t.second.equal(plain[i].t.second)) << i;
  EXPECT_TRUE(here[2].t.second_scale.equal(plain[2].t.second_scale));
}

TEST(Sophia, WithoutCurvature_IsRefused) {
  Fixture f(16);
  f.t.second = Tensor();
  EXPECT_THROW(f.update(kStep), InternalError);
}

}  // namespace
}  // namespace capstan::optim
