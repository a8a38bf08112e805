// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/base/philox.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <set>
#include <vector>

#include "capstan/base/error.h"

namespace capstan::philox {
namespace {

// Random123's known answers for philox4x32-10.
TEST(Philox, KnownAnswers) {
  EXPECT_EQ(block({0, 0, 0, 0}, {0, 0}), (Counter{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  const uint32_t ones = 0xffffffff;
  EXPECT_EQ(block({ones, ones, ones, ones}, {ones, ones}),
            (Counter{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(block({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Counter{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Philox, Draw_UsesEveryBitOfItsArguments) {
  std::set<uint64_t> seen = {bits64(0, 0, 0)};
  for (int bit = 0; bit < 64; ++bit) {
    const uint64_t one = uint64_t{1} << bit;
    EXPECT_TRUE(seen.insert(bits64(one, 0, 0)).second);
    EXPECT_TRUE(seen.insert(bits64(0, one, 0)).second);
    EXPECT_TRUE(seen.insert(bits64(0, 0, one)).second);
  }
}

TEST(Philox, Quantile_MatchesFiftyDigitReference) {
  struct Case {
    double p, x;
  };
  for (const Case& c : std::vector<Case>{{0.25, -0.6744897501960817432},
                                         {0.025, -1.9599639845400542118},
                                         {0.075, -1.4395314709384559349},
                                         {0.4375, -0.15731068461017069552},
                                         {1e-4, -3.7190164854556805523},
                                         {1e-9, -5.9978070150076868614},
                                         {1.4e-11, -6.6567230915181836356},
                                         {0x1p-53, -8.2095361516013868556},
                                         {1e-100, -21.273453560965324294},
                                         {1e-300, -37.047096299361199237},
                                         {5e-324, -38.467405617144346251}}) {
    EXPECT_NEAR(inverse_normal_cdf(c.p) / c.x, 1.0, 1e-12) << c.p;
  }
  EXPECT_EQ(inverse_normal_cdf(0.5), 0.0);
}

TEST(Philox, Quantile_InvertsErfcOverTheWholeRange) {
  for (double exponent = -700; exponent < -0.7; exponent += 0.37) {
    const double p = std::exp(exponent), x = inverse_normal_cdf(p);
    // d log(cdf) / dx is about -x in the tail, so an error in x shows magnified in log p.
    const double back = std::log(0.5 * std::erfc(-x * std::sqrt(0.5)));
    EXPECT_NEAR(back / exponent, 1.0, 1e-9) << p;
  }
  for (int i = 1; i < 4000; ++i) {
    const double p = i / 4000.0, x = inverse_normal_cdf(p);
    EXPECT_NEAR(0.5 * std::erfc(-x * std::sqrt(0.5)), p, 1e-13) << p;
  }
}

TEST(Philox, Quantile_IsOddAndIncreasing) {
  double before = -1e300;
  for (int i = 1; i < 1 << 16; ++i) {
    const double p = i * 0x1p-16, x = inverse_normal_cdf(p);
    EXPECT_EQ(x, -inverse_normal_cdf(1.0 - p));
    EXPECT_GT(x, before);
    before = x;
  }
  // Across the seams of the three pieces.
  for (const double seam : {0.075, std::exp(-25.0)}) {
    double p = seam * (1 - 1e-12);
    double last = inverse_normal_cdf(p);
    for (int i = 0; i < 40; ++i) {
      p += seam * 5e-14;
      const double x = inverse_normal_cdf(p);
      EXPECT_NEAR(x, last, 1e-12 * std::abs(last));
      last = x;
    }
  }
}

TEST(Philox, Quantile_RefusesTheEnds) {
  EXPECT_THROW((void)inverse_normal_cdf(0.0), InternalError);
  EXPECT_THROW((void)inverse_normal_cdf(1.0), InternalError);
  EXPECT_THROW((void)inverse_normal_cdf(std::nan("")), InternalError);
}

// Expected bits: the same formulas in Python, whose numbers are IEEE doubles without contraction.
TEST(Philox, Normal_BitsArePinned) {
  const std::vector<uint64_t> expected = {0x3fe6ea80630a834cull, 0xbff85b1285dfe14aull,
                                          0x3ff1dbff12355868ull, 0xbfee635242512933ull,
                                          0xbfd7b8523cf5b220ull, 0x3ff233cf95d37f2eull};
  std::vector<uint64_t> got;
  for (uint64_t i = 0; i < expected.size(); ++i) {
    got.push_back(std::bit_cast<uint64_t>(normal(1234, stream_of("init", "w"), i * 1000003)));
  }
  EXPECT_EQ(got, expected);
  uint64_t mixed = 0;
  for (uint64_t i = 0; i < 100000; ++i) {
    mixed = mixed * 0x9E3779B97F4A7C15ull + std::bit_cast<uint64_t>(normal(7, 11, i));
  }
  EXPECT_EQ(mixed, uint64_t{0x32eca1d37b9bfebdull}) << "tails and centre alike";
}

TEST(Philox, Normal_HasItsMoments) {
  constexpr int kCount = 1 << 18;
  double sum = 0, squares = 0, cubes = 0, fourths = 0;
  for (int i = 0; i < kCount; ++i) {
    const double x = normal(42, 3, static_cast<uint64_t>(i));
    sum += x;
    squares += x * x;
    cubes += x * x * x;
    fourths += x * x * x * x;
  }
  const double sigma = 1.0 / std::sqrt(kCount);  // 5 deviations of each estimate
  EXPECT_NEAR(sum / kCount, 0.0, 5 * sigma);
  EXPECT_NEAR(squares / kCount, 1.0, 5 * sigma * std::sqrt(2.0));
  EXPECT_NEAR(cubes / kCount, 0.0, 5 * sigma * std::sqrt(15.0));
  EXPECT_NEAR(fourths / kCount, 3.0, 5 * sigma * std::sqrt(96.0));
}

TEST(Philox, Uniform_StaysInside) {
  for (uint64_t i = 0; i < 10000; ++i) {
    const double u = uniform(1, 2, i);
    EXPECT_GT(u, 0.0);
    EXPECT_LT(u, 1.0);
  }
}

TEST(Philox, Fill_EqualsSingleDrawsAtAnyCut) {
  std::vector<double> whole(1000), parts(1000);
  std::vector<float> single(1000);
  const uint64_t first = (uint64_t{1} << 32) - 500;  // crosses the low word of the counter
  fill_normal(std::span<double>(whole), 5, 6, first, 0.02);
  fill_normal(std::span<double>(parts).first(333), 5, 6, first, 0.02);
  fill_normal(std::span<double>(parts).subspan(333), 5, 6, first + 333, 0.02);
  fill_normal(std::span<float>(single), 5, 6, first, 0.02);
  EXPECT_EQ(whole, parts);
  for (size_t i = 0; i < whole.size(); ++i) {
    EXPECT_EQ(whole[i], normal(5, 6, first + i) * 0.02);
    EXPECT_EQ(single[i], static_cast<float>(whole[i]));
  }
}

TEST(Philox, Streams_DifferByPurposeAndName) {
  EXPECT_NE(stream_of("init", "a"), stream_of("init", "b"));
  EXPECT_NE(stream_of("init", "a"), stream_of("drop", "a"));
  EXPECT_NE(stream_of("ab", "c"), stream_of("a", "bc"));
  EXPECT_EQ(stream_of("init", "a"), stream_of("init", "a"));
}

}  // namespace
}  // namespace capstan::philox
