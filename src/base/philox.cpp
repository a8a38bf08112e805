// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/base/philox.h"

#include <bit>
#include <cmath>

#include "capstan/base/check.h"
#include "capstan/base/hash.h"
#include "capstan/base/normal_quantile.h"

namespace capstan::philox {

namespace {

using namespace normal_quantile;

double polynomial(const Coefficients& coefficients, double x) {
  double value = coefficients[7];
  for (int i = 6; i >= 0; --i) value = value * x + coefficients[i];
  return value;
}

// log(x) for x > 0 out of additions, multiplications and one division: x = m 2^e with m in
// [sqrt(1/2), sqrt(2)), log m = 2 atanh(f), f = (m-1)/(m+1), |f| < 0.1716, so the series is exact
// to a double after f^21.
double natural_log(double x) {
  int64_t shift = 0;
  if (x < 0x1p-1022) {
    x *= 0x1p54;
    shift = -54;
  }
  const uint64_t bits = std::bit_cast<uint64_t>(x);
  constexpr uint64_t kMantissa = 0x000FFFFFFFFFFFFFull;
  int64_t exponent = static_cast<int64_t>(bits >> 52) - 1023 + shift;
  double m = std::bit_cast<double>((bits & kMantissa) | 0x3FF0000000000000ull);
  if (m > 1.4142135623730951) {
    m *= 0.5;
    ++exponent;
  }
  const double f = (m - 1.0) / (m + 1.0), s = f * f;
  double series = 0.0;
  for (int k = 21; k >= 1; k -= 2) series = series * s + 1.0 / k;
  return static_cast<double>(exponent) * 0.69314718055994531 + 2.0 * f * series;
}

template <class T>
void fill(std::span<T> out, uint64_t seed, uint64_t stream, uint64_t first, double deviation) {
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = static_cast<T>(normal(seed, stream, first + i) * deviation);
  }
}

}  // namespace

Counter block(Counter counter, Key key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0], b = uint64_t{0xCD9E8D57} * counter[2];
    const auto high = [](uint64_t product) { return static_cast<uint32_t>(product >> 32); };
    counter = {high(b) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
               high(a) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
    key = {key[0] + 0x9E3779B9u, key[1] + 0xBB67AE85u};
  }
  return counter;
}

Counter draw(uint64_t seed, uint64_t stream, uint64_t index) {
  const auto low = [](uint64_t value) { return static_cast<uint32_t>(value); };
  return block({low(index), low(index >> 32), low(stream), low(stream >> 32)},
               {low(seed), low(seed >> 32)});
}

uint64_t bits64(uint64_t seed, uint64_t stream, uint64_t index) {
  const Counter random = draw(seed, stream, index);
  return uint64_t{random[1]} << 32 | random[0];
}

double uniform(uint64_t seed, uint64_t stream, uint64_t index) {
  // 52 bits plus one half: never 0 or 1, symmetric about 1/2, every step exact.
  return (static_cast<double>(bits64(seed, stream, index) >> 12) + 0.5) * 0x1p-52;
}

double inverse_normal_cdf(double p) {
  CAPSTAN_CHECK(p > 0.0 && p < 1.0, "quantile of {}", p);
  const double q = p - 0.5;
  if (q >= -0.425 && q <= 0.425) {
    const double r = 0.180625 - q * q;
    return q * polynomial(kCentreP, r) / polynomial(kCentreQ, r);
  }
  const double r = std::sqrt(-natural_log(q < 0.0 ? p : 1.0 - p));
  const double x = r <= 5.0 ? polynomial(kTailP, r - 1.6) / polynomial(kTailQ, r - 1.6)
                            : polynomial(kFarP, r - 5.0) / polynomial(kFarQ, r - 5.0);
  return q < 0.0 ? -x : x;
}

double normal(uint64_t seed, uint64_t stream, uint64_t index) {
  return inverse_normal_cdf(uniform(seed, stream, index));
}

uint64_t stream_of(std::string_view purpose, std::string_view name) {
  return xxh3_64(name, xxh3_64(purpose));
}

void fill_normal(std::span<float> out, uint64_t seed, uint64_t stream, uint64_t first,
                 double deviation) {
  fill(out, seed, stream, first, deviation);
}
void fill_normal(std::span<double> out, uint64_t seed, uint64_t stream, uint64_t first,
                 double deviation) {
  fill(out, seed, stream, first, deviation);
}

}  // namespace capstan::philox
