// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Moments of 16 and 8 bits against scalar references.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "capstan/base/error.h"
#include "capstan/base/philox.h"
#include "capstan/kernels/dynamic_code.h"
#include "capstan/optim/flat_update.h"
#include "optim/cpu/kernels.h"
#include "wave.h"

namespace capstan::optim {
namespace {

const FlatStep kStep{.lr = 3e-3,
                     .beta1 = 0.9,
                     .beta2 = 0.95,
                     .eps = 1e-8,
                     .weight_decay = 0.1,
                     .rho = 0.7,
                     .gradient_scale = 0.5,
                     .count = 3,
                     .seed = 7};
constexpr UpdateRule kRules[] = {UpdateRule::kAdamW, UpdateRule::kLion, UpdateRule::kSophia};
bool has_second(UpdateRule rule) { return rule != UpdateRule::kLion; }

struct Fixture {
  FlatTensors t;
  Fixture(UpdateRule rule, int64_t count, at::ScalarType moments) {
    const bool blocks = moments == at::kByte;
    t.weights = wave(count, 0.1, at::kFloat);
    t.gradient = wave(count, 1.3, at::kFloat);
    t.first = blocks ? at::arange(count, at::kLong).mul_(37).to(at::kByte)
                     : wave(count, 2.1).mul_(0.1).to(moments);
    if (has_second(rule))
      t.second = blocks ? at::arange(count, at::kLong).mul_(91).remainder_(201).to(at::kByte)
                        : wave(count, 0.7).square_().mul_(0.01).to(moments);
    if (!blocks) return;
    t.first_scale = wave(count / 256, 0.4, at::kFloat).abs_();
    if (has_second(rule)) t.second_scale = wave(count / 256, 0.9, at::kFloat).abs_();
  }
};

// One element in fp32, operation by operation.
struct Scalar {
  float w, m, v;
};
Scalar updated(UpdateRule rule, Scalar x, float gradient) {
  const auto f = [](double value) { return static_cast<float>(value); };
  const float g = gradient * f(kStep.gradient_scale);
  const float decay = f(1 - kStep.lr * kStep.weight_decay);
  const float b1 = f(kStep.beta1), r1 = f(1 - kStep.beta1), b2 = f(kStep.beta2),
              r2 = f(1 - kStep.beta2);
  if (rule == UpdateRule::kLion) {
    const float u = x.m * b1 + g * r1;
    const float sign = static_cast<float>(u > 0) - static_cast<float>(u < 0);
    return {x.w * decay - f(kStep.lr) * sign, x.m * b2 + g * r2, 0};
  }
  const float m = x.m * b1 + g * r1, v = x.v * b2 + (g * g) * r2;
  if (rule == UpdateRule::kSophia) {
    const float quotient = m / (x.v * f(kStep.rho) + f(1e-15));
    return {x.w * decay - f(kStep.lr) * std::clamp(quotient, -1.0F, 1.0F), m, x.v};
  }
  const double bias1 = 1 - std::pow(kStep.beta1, 3.0), bias2 = 1 - std::pow(kStep.beta2, 3.0);
  return {x.w * decay -
              f(kStep.lr / bias1) * (m / (std::sqrt(v) * f(1 / std::sqrt(bias2)) + f(kStep.eps))),
          m, v};
}

// Of the tensors that an update changes.
FlatTensors copies_of(const FlatTensors& t) {
  const auto copy = [](const Tensor& x) { return x.defined() ? x.clone() : x; };
  return {copy(t.weights), t.gradient,          copy(t.first),       copy(t.second),
          copy(t.copy),    copy(t.first_scale), copy(t.second_scale)};
}

at::BFloat16 rounded(float x, uint32_t random) {
  const auto bits = std::bit_cast<uint32_t>(x) + (random & 0xffffU);
  return {static_cast<uint16_t>(bits >> 16), at::BFloat16::from_bits()};
}

TEST(Bf16Moments, AreRoundedByTheBitsOfTheirElement) {
  constexpr int64_t kCount = 1500;
  constexpr uint64_t kFirst = 0xffffff00;  // indices pass 2^32
  for (const UpdateRule rule : kRules) {
    Fixture f(rule, kCount, at::kBFloat16);
    const FlatTensors before = copies_of(f.t);
    const FlatJob job{&f.t, 0, kCount, true, kFirst};
    update_flat(rule, {&job, 1}, kStep);
    for (int64_t i = 0; i < kCount; ++i) {
      const Scalar x{before.weights[i].item<float>(), before.first[i].item<float>(),
                     has_second(rule) ? before.second[i].item<float>() : 0};
      const Scalar y = updated(rule, x, before.gradient[i].item<float>());
      const auto random = philox::draw(7, 3, kFirst + static_cast<uint64_t>(i));
      ASSERT_EQ(f.t.weights[i].item<float>(), y.w) << i;
      ASSERT_EQ(f.t.first[i].item<float>(), static_cast<float>(rounded(y.m, random[0]))) << i;
      if (rule != UpdateRule::kAdamW) continue;
      ASSERT_EQ(f.t.second[i].item<float>(), static_cast<float>(rounded(y.v, random[1]))) << i;
    }
    if (rule == UpdateRule::kSophia) {
      EXPECT_TRUE(f.t.second.equal(before.second));
    }
  }
}

TEST(Bf16Moments, NoCutChangesTheirBits) {
  constexpr int64_t kCount = 40000;
  for (const UpdateRule rule : kRules) {
    Fixture whole(rule, kCount, at::kBFloat16), cut(rule, kCount, at::kBFloat16);
    const FlatJob job{&whole.t, 0, kCount, true, 1000};
    update_flat(rule, {&job, 1}, kStep);
    std::vector<FlatJob> jobs;
    for (int64_t begin = 0, size = 1; begin < kCount; begin += size, size = size * 3 + 1)
      jobs.push_back({&cut.t, begin, std::min(kCount, begin + size), true,
                      1000 + static_cast<uint64_t>(begin)});
    update_flat(rule, jobs, kStep);
    EXPECT_TRUE(whole.t.first.equal(cut.t.first));
    EXPECT_TRUE(whole.t.weights.equal(cut.t.weights));
    EXPECT_TRUE(rule == UpdateRule::kLion || whole.t.second.equal(cut.t.second));
  }
}

TEST(Bf16Moments, AnotherStepOrSeed_DrawsOtherBits) {
  const auto first_of = [](int64_t count, uint64_t seed) {
    Fixture f(UpdateRule::kLion, 4096, at::kBFloat16);
    FlatStep step = kStep;
    step.count = count;
    step.seed = seed;
    const FlatJob job{&f.t, 0, 4096};
    update_flat(UpdateRule::kLion, {&job, 1}, step);
    return f.t.first;
  };
  EXPECT_FALSE(first_of(3, 7).equal(first_of(4, 7)));
  EXPECT_FALSE(first_of(3, 7).equal(first_of(3, 8)));
}

TEST(Bf16Moments, AreRightOnAverage) {
  // Without betas the moment is the gradient: 1 + 1/512, a quarter of the way to the next number.
  Fixture f(UpdateRule::kLion, 65536, at::kBFloat16);
  f.t.gradient.fill_(1 + 1.0 / 512);
  const FlatJob job{&f.t, 0, 65536};
  update_flat(UpdateRule::kLion, {&job, 1}, {.lr = 0, .beta1 = 0, .beta2 = 0});
  EXPECT_NEAR(f.t.first.to(at::kDouble).mean().item<double>(), 1 + 1.0 / 512,
              4 * (1.0 / 128) * std::sqrt(3.0 / 16 / 65536));
}

const kernels::DynamicCode& kFirst = kernels::kMomentCodes.first;
const kernels::DynamicCode& kSecond = kernels::kMomentCodes.second;

double at_place(const kernels::DynamicCode& code, int place) {
  return code.number[static_cast<uint8_t>(place - code.zero)];
}

TEST(DynamicCode, IsThatOfThePaper) {
  for (const auto* code : {&kFirst, &kSecond}) {
    EXPECT_EQ(code->number[0], 0);
    EXPECT_EQ(at_place(*code, 255), 1);
    for (int place = 1; place < 256; ++place)
      EXPECT_LT(at_place(*code, place - 1), at_place(*code, place)) << place;
  }
  EXPECT_EQ(kFirst.zero, 127);
  EXPECT_EQ(kSecond.zero, 0);
  for (int i = 1; i < 127; ++i)
    EXPECT_EQ(at_place(kFirst, 127 + i), -at_place(kFirst, 127 - i)) << i;
  // Ends of the tables of bitsandbytes, create_dynamic_map(True) and (False).
  EXPECT_FLOAT_EQ(at_place(kFirst, 128), 5.5e-7F);
  EXPECT_FLOAT_EQ(at_place(kFirst, 254), 0.99296875F);
  EXPECT_FLOAT_EQ(at_place(kFirst, 0), -0.99296875F);
  EXPECT_FLOAT_EQ(at_place(kSecond, 1), 3.25e-7F);
  EXPECT_FLOAT_EQ(at_place(kSecond, 254), 0.996484375F);
}

// The byte of the nearest number, by looking at all of them.
uint8_t nearest(float x, const kernels::DynamicCode& code, bool keeps_positive) {
  int best = 0;
  for (int place = 1; place < 256; ++place)
    if (std::fabs(at_place(code, place) - x) < std::fabs(at_place(code, best) - x)) best = place;
  if (keeps_positive && best == code.zero) best = code.zero + 1;
  return static_cast<uint8_t>(best - code.zero);
}

float second_of(const FlatTensors& t, int64_t i) {
  if (!t.second.defined()) return 0;
  return kSecond.number[t.second[i].item<uint8_t>()] * t.second_scale[i / 256].item<float>();
}

// The block of `out` is that of `in` updated.
void expect_block(UpdateRule rule, const FlatTensors& in, const FlatTensors& out, int64_t block) {
  std::vector<Scalar> values;
  float m_scale = 0, v_scale = 0;
  for (int64_t i = block * 256; i < (block + 1) * 256; ++i) {
    const Scalar x{in.weights[i].item<float>(),
                   kFirst.number[in.first[i].item<uint8_t>()] * in.first_scale[block].item<float>(),
                   second_of(in, i)};
    values.push_back(updated(rule, x, in.gradient[i].item<float>()));
    m_scale = std::max(m_scale, std::fabs(values.back().m));
    v_scale = std::max(v_scale, values.back().v);
  }
  const bool writes_second = rule == UpdateRule::kAdamW;
  ASSERT_EQ(out.first_scale[block].item<float>(), m_scale);
  if (writes_second) {
    ASSERT_EQ(out.second_scale[block].item<float>(), v_scale);
  }
  for (int64_t j = 0; j < 256; ++j) {
    const Scalar& y = values[static_cast<size_t>(j)];
    const int64_t i = block * 256 + j;
    ASSERT_EQ(out.weights[i].item<float>(), y.w) << i;
    ASSERT_EQ(out.first[i].item<uint8_t>(), nearest(y.m / m_scale, kFirst, false)) << i;
    if (!writes_second) continue;
    ASSERT_EQ(out.second[i].item<uint8_t>(), nearest(y.v / v_scale, kSecond, y.v > 0)) << i;
  }
}

TEST(EightBitMoments, AreReadUpdatedAndCodedBlockByBlock) {
  constexpr int64_t kCount = 1024;
  for (const UpdateRule rule : kRules) {
    Fixture f(rule, kCount, at::kByte);
    f.t.copy = at::zeros({kCount}, at::kBFloat16);
    const FlatTensors in = copies_of(f.t);
    const FlatJob job{&f.t, 0, kCount};
    update_flat(rule, {&job, 1}, kStep);
    for (int64_t block = 0; block < kCount / 256; ++block) expect_block(rule, in, f.t, block);
    EXPECT_TRUE(f.t.copy.equal(f.t.weights.to(at::kBFloat16)));
    if (rule != UpdateRule::kSophia) continue;
    EXPECT_TRUE(f.t.second.equal(in.second));
    EXPECT_TRUE(f.t.second_scale.equal(in.second_scale));
  }
}

TEST(EightBitMoments, OfNothing_StayZero) {
  Fixture f(UpdateRule::kAdamW, 512, at::kByte);
  for (Tensor* x : {&f.t.gradient, &f.t.first, &f.t.second, &f.t.first_scale, &f.t.second_scale})
    x->zero_();
  f.t.weights.zero_();
  const FlatJob job{&f.t, 0, 512};
  update_flat(UpdateRule::kAdamW, {&job, 1}, kStep);
  for (const Tensor& x : {f.t.weights, f.t.first, f.t.second, f.t.first_scale, f.t.second_scale})
    EXPECT_EQ(x.ne(0).sum().item<int64_t>(), 0);
}

// A gradient beside one a million times larger: as 0 its second moment would make the next step
// m / epsilon.
TEST(EightBitMoments, SmallSecondMoment_KeepsItsStepBounded) {
  Fixture f(UpdateRule::kAdamW, 256, at::kByte);
  for (Tensor* x : {&f.t.first, &f.t.second, &f.t.first_scale, &f.t.second_scale}) x->zero_();
  f.t.gradient.fill_(1e-4);
  f.t.gradient[0] = 100;
  const FlatJob job{&f.t, 0, 256, false};
  const Tensor before = f.t.weights.clone();
  FlatStep step = kStep;
  for (step.count = 1; step.count <= 20; ++step.count) {
    update_flat(UpdateRule::kAdamW, {&job, 1}, step);
    f.t.gradient.zero_();
  }
  EXPECT_LT(difference(f.t.weights, before), 20 * step.lr);
}

TEST(EightBitMoments, TrackThoseOfFp32) {
  constexpr int64_t kCount = 4096;
  Fixture narrow(UpdateRule::kAdamW, kCount, at::kByte),
      wide(UpdateRule::kAdamW, kCount, at::kFloat);
  for (Tensor* x : {&narrow.t.first, &narrow.t.second, &narrow.t.first_scale,
                    &narrow.t.second_scale, &wide.t.first, &wide.t.second})
    x->zero_();
  const Tensor start = wide.t.weights.clone();
  FlatStep step = kStep;
  for (step.count = 1; step.count <= 50; ++step.count)
    for (Fixture* f : {&narrow, &wide}) {
      f->t.gradient = wave(kCount, 0.1 * static_cast<double>(step.count), at::kFloat);
      const FlatJob job{&f->t, 0, kCount};
      update_flat(UpdateRule::kAdamW, {&job, 1}, step);
    }
  const double path = difference(wide.t.weights, start);
  EXPECT_GT(path, 0.05);
  const Tensor error = narrow.t.weights.sub(wide.t.weights).to(at::kDouble);
  EXPECT_LT(error.square().mean().sqrt().item<double>(), 0.03 * path);
}

void run_by(const cpu::UpdateKernels& k, const FlatTensors& t, bool blocks) {
  const cpu::Factors<float> factors{.gradient_scale = 0.5F,
                                    .decay = 0.999F,
                                    .beta1 = 0.9F,
                                    .rest1 = 0.1F,
                                    .beta2 = 0.95F,
                                    .rest2 = 0.05F,
                                    .step_size = 3e-3F,
                                    .inverse_root = 1.5F,
                                    .eps = 1e-8F,
                                    .rho = 0.7F,
                                    .seed = 7,
                                    .step = 3};
  const auto data = [](const Tensor& x) { return x.defined() ? x.data_ptr() : nullptr; };
  auto* const w = t.weights.data_ptr<float>();
  const auto* const g = t.gradient.const_data_ptr<float>();
  const int64_t count = t.weights.numel();
  if (blocks)
    k.blocks({w, g, t.first.data_ptr<uint8_t>(), static_cast<uint8_t*>(data(t.second)),
              t.first_scale.data_ptr<float>(), static_cast<float*>(data(t.second_scale)), count},
             factors, kernels::kMomentCodes);
  else
    k.bf16_moments({w, g, static_cast<uint16_t*>(data(t.first)),
                    static_cast<uint16_t*>(data(t.second)), count, 5},
                   factors);
}

const cpu::UpdateKernels& of_rule(const cpu::Kernels& k, UpdateRule rule) {
  return rule == UpdateRule::kAdamW ? k.adamw : rule == UpdateRule::kLion ? k.lion : k.sophia;
}

TEST(NarrowMoments, AllInstructionSetsGiveTheSameBits) {
  for (const UpdateRule rule : kRules)
    for (const bool blocks : {false, true}) {
      const auto type = blocks ? at::kByte : at::kBFloat16;
      Fixture here(rule, 2048, type), plain(rule, 2048, type);
      run_by(of_rule(cpu::kernels(), rule), here.t, blocks);
      run_by(of_rule(cpu::plain::kKernels, rule), plain.t, blocks);
      EXPECT_TRUE(here.t.weights.equal(plain.t.weights));
      EXPECT_TRUE(here.t.first.equal(plain.t.first));
      EXPECT_TRUE(!has_second(rule) || here.t.second.equal(plain.t.second));
      EXPECT_TRUE(!blocks || here.t.first_scale.equal(plain.t.first_scale));
    }
}

TEST(NarrowMoments, WhatDoesNotFit_IsRefused) {
  Fixture blocks(UpdateRule::kAdamW, 512, at::kByte);
  const FlatJob torn{&blocks.t, 0, 300};
  EXPECT_THROW(update_flat(UpdateRule::kAdamW, {&torn, 1}, kStep), InternalError);
  blocks.t.first_scale = at::zeros({1}, at::kFloat);
  const FlatJob whole{&blocks.t, 0, 512};
  EXPECT_THROW(update_flat(UpdateRule::kAdamW, {&whole, 1}, kStep), InternalError);
  Fixture wide(UpdateRule::kAdamW, 512, at::kBFloat16);
  wide.t.weights = wide.t.weights.to(at::kDouble);
  wide.t.gradient = wide.t.gradient.to(at::kDouble);
  const FlatJob job{&wide.t, 0, 512};
  EXPECT_THROW(update_flat(UpdateRule::kAdamW, {&job, 1}, kStep), InternalError);
}

}  // namespace
}  // namespace capstan::optim
